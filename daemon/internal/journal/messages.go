package journal

// Message says what an entry is about, for programs: it is the entry's
// MESSAGE_ID (systemd.journal-fields(7)), and stays the same whatever the text
// says. virtbackup.catalog has an explanation of each for people, which
// "journalctl --catalog" shows.
//
// An entry gets one as an attribute:
//
//	log.Error("cannot back up", journal.MessageID, journal.BackupFailed, journal.Error, err)
type Message string

// MessageID is the key of the attribute with a Message.
const MessageID = "message_id"

// The messages. None is ever given another meaning.
const (
	BackupSucceeded      Message = "85084edf41ee499c9cc318c2a81961b2" // a backup was made
	BackupFailed         Message = "3e119becfb6444e1b52e6367b4d2fff9" // a backup was not made
	RestoreSucceeded     Message = "b6c8db53212b4d7d9a172703b3afd48c" // a restore is done
	RestoreFailed        Message = "71546fcf00c74d1d8e73126bad73a1d3" // a restore came to nothing
	JobSucceeded         Message = "4f3b66c59b8a4c4ab6a7f6205d6c51cf" // another job is done
	JobFailed            Message = "f9868310a8364667a4a3f784f24a66f4" // another job came to nothing
	JobCancelled         Message = "786e7dd869364c11802b109726a6b641" // somebody stopped a job
	JobStalled           Message = "d73709fe91f24336b7c9c9264aa53e10" // a job makes no progress
	BackupDamaged        Message = "586e130ff16a431cbf16fd7a2f8dcb67" // stored data is not what was written
	BackupsRemoved       Message = "ac015093a030417b81ba0229a89c56b2" // retention removed backups
	RepositoryUnhealthy  Message = "a9847c8b5c8645bb8719915917ce7318" // a repository cannot be used
	RepositoryHealthy    Message = "c3e45240c8794c70800b5a09b37759a0" // it can be used again
	ScheduleSkipped      Message = "27563197b70740428856be72e611bbda" // a schedule made no backup
	GuestHeld            Message = "9706d7b5abeb4e12b0a221601e96f90a" // a guest may be frozen
	CatalogDamaged       Message = "ce7d472bd1b54756867fc235f38c77b1" // the catalog was lost
	DiskChangedUnseen    Message = "816d26b1b3784989be272d739394e620" // tracking of a disk is broken
	BackupNotValid       Message = "5b1c8f0f6a5d4f5e9a3c0e7d2b9a41c6" // a backup was tried, and is not valid
	QuotaExceeded        Message = "e7d8788c4248481481badf18630bc4bf" // a backup was refused
	Ready                Message = "9239271de03848a9bb868562c7238788" // virtbackupd serves
	ConfigurationRefused Message = "9e1ff5c238fa456fabe6d1273a1a13d2" // settings were not taken
)

// Messages returns all of them.
func Messages() []Message {
	return []Message{
		BackupSucceeded, BackupFailed, RestoreSucceeded, RestoreFailed, JobSucceeded,
		JobFailed, JobCancelled, JobStalled, BackupDamaged, BackupsRemoved,
		RepositoryUnhealthy, RepositoryHealthy, ScheduleSkipped, GuestHeld, CatalogDamaged,
		DiskChangedUnseen, BackupNotValid, QuotaExceeded, Ready, ConfigurationRefused,
	}
}
