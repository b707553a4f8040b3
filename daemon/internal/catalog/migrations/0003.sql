-- Backups that run themselves: offerings, schedules, the queue, retention, and storage that is mounted.


-- == offerings and domains


-- == schedules


-- == jobs and groups


-- == quotas


-- == repositories


-- == retention


