package dbus

import "time"

// Record is the properties of one object. interfaces/ says what each means.
type Record interface {
	// Ref names the object.
	Ref() Ref
	// Details are what polkit is told of the object, for its rules.
	Details() map[string]string
}

// Bare stands for an object of which only is told that it is there.
type Bare Ref

// Ref names the object.
func (b Bare) Ref() Ref { return Ref(b) }

// Details has nothing to tell.
func (Bare) Details() map[string]string { return map[string]string{} }

// ManagerProperties are those of org.virtbackup1.Manager.
type ManagerProperties struct {
	Version          string    `dbus:"Version"`
	Host             string    `dbus:"Host"`
	Started          time.Time `dbus:"Started"`
	LibvirtConnected bool      `dbus:"LibvirtConnected"`
	LibvirtError     string    `dbus:"LibvirtError"`
	HookState        HookState `dbus:"HookState"`
	HookLast         time.Time `dbus:"HookLast"`
	JobsRunning      uint32    `dbus:"JobsRunning"`
	JobsQueued       uint32    `dbus:"JobsQueued"`
}

// RepositoryProperties are those of org.virtbackup1.Repository.
type RepositoryProperties struct {
	ID           string          `dbus:"Id"`
	Name         string          `dbus:"Name"`
	Type         string          `dbus:"Type"`
	Path         string          `dbus:"Path"`
	State        RepositoryState `dbus:"State"`
	StateMessage string          `dbus:"StateMessage"`
	StateSince   time.Time       `dbus:"StateSince"`
	TotalBytes   uint64          `dbus:"TotalBytes"`
	FreeBytes    uint64          `dbus:"FreeBytes"`
	MinimumFree  uint64          `dbus:"MinimumFree"`
	Checked      time.Time       `dbus:"Checked"`

	Address        string   `dbus:"Address"`
	FileSystem     string   `dbus:"FileSystem"`
	MountOptions   []string `dbus:"MountOptions"`
	HasCredentials bool     `dbus:"HasCredentials"`
	Mounted        bool     `dbus:"Mounted"`

	Created time.Time `dbus:"Created"`
}

// OfferingProperties are those of org.virtbackup1.Offering.
type OfferingProperties struct {
	ID               string        `dbus:"Id"`
	Name             string        `dbus:"Name"`
	Repository       string        `dbus:"Repository"`
	Mode             Mode          `dbus:"Mode"`
	Compression      Compression   `dbus:"Compression"`
	CompressionLevel uint32        `dbus:"CompressionLevel"`
	Threads          uint32        `dbus:"Threads"`
	ChainSize        uint32        `dbus:"ChainSize"`
	Quiesce          Quiesce       `dbus:"Quiesce"`
	QuiescePolicy    QuiescePolicy `dbus:"QuiescePolicy"`
	Tracking         Tracking      `dbus:"Tracking"`
	Fallback         Fallback      `dbus:"Fallback"`
	Domains          []string      `dbus:"Domains"`

	Description         string   `dbus:"Description"`
	Origin              string   `dbus:"Origin"`
	Disabled            bool     `dbus:"Disabled"`
	Users               []string `dbus:"Users"`
	AllowUserBackups    bool     `dbus:"AllowUserBackups"`
	AllowUserSchedules  bool     `dbus:"AllowUserSchedules"`
	AllowQuickRestore   bool     `dbus:"AllowQuickRestore"`
	AllowFileExtraction bool     `dbus:"AllowFileExtraction"`
	Validate            bool     `dbus:"Validate"`
	ValidationSteps     []string `dbus:"ValidationSteps"`

	ValidationBootTimeout    uint32   `dbus:"ValidationBootTimeout"`
	ValidationCommand        string   `dbus:"ValidationCommand"`
	ValidationArguments      []string `dbus:"ValidationArguments"`
	ValidationExpected       string   `dbus:"ValidationExpected"`
	ValidationCommandTimeout uint32   `dbus:"ValidationCommandTimeout"`
	ValidationScreenshotWait uint32   `dbus:"ValidationScreenshotWait"`
	ValidationPorts          []string `dbus:"ValidationPorts"`

	CompressionTime CompressionTime `dbus:"CompressionTime"`
	IncludeDisks    []string        `dbus:"IncludeDisks"`
	ExcludeDisks    []string        `dbus:"ExcludeDisks"`
	VolatileDisks   bool            `dbus:"VolatileDisks"`
	KeepLast        uint32          `dbus:"KeepLast"`
	KeepHourly      uint32          `dbus:"KeepHourly"`
	KeepDaily       uint32          `dbus:"KeepDaily"`
	KeepWeekly      uint32          `dbus:"KeepWeekly"`
	KeepMonthly     uint32          `dbus:"KeepMonthly"`
	KeepYearly      uint32          `dbus:"KeepYearly"`

	Created time.Time `dbus:"Created"`
}

// ScheduleProperties are those of org.virtbackup1.Schedule.
type ScheduleProperties struct {
	ID              string          `dbus:"Id"`
	Name            string          `dbus:"Name"`
	DomainUUID      string          `dbus:"DomainUuid"`
	DomainName      string          `dbus:"DomainName"`
	Offering        string          `dbus:"Offering"`
	Repository      string          `dbus:"Repository"`
	Calendars       []string        `dbus:"Calendars"`
	RandomizedDelay uint64          `dbus:"RandomizedDelay"`
	Persistent      bool            `dbus:"Persistent"`
	Isolated        bool            `dbus:"Isolated"`
	Quiesce         ScheduleQuiesce `dbus:"Quiesce"`
	Overlap         Overlap         `dbus:"Overlap"`
	Enabled         bool            `dbus:"Enabled"`
	Unit            string          `dbus:"Unit"`
	Problem         string          `dbus:"Problem"`
	NextElapse      time.Time       `dbus:"NextElapse"`
	LastRun         time.Time       `dbus:"LastRun"`
	LastState       RunState        `dbus:"LastState"`
	LastReason      string          `dbus:"LastReason"`
	LastSuccess     time.Time       `dbus:"LastSuccess"`
	Jobs            []string        `dbus:"Jobs"`
	UID             uint32          `dbus:"Uid"`
	Created         time.Time       `dbus:"Created"`
}

// ScheduleRun is one of Schedule.ListRuns.
type ScheduleRun struct {
	ID       string    `dbus:"id"`
	State    RunState  `dbus:"state"`
	Reason   string    `dbus:"reason"`
	Jobs     []string  `dbus:"jobs"`
	Timer    bool      `dbus:"timer"`
	UID      uint32    `dbus:"uid"`
	Created  time.Time `dbus:"created"`
	Finished time.Time `dbus:"finished"`
}

// DomainDisk is one of DomainProperties.Disks.
type DomainDisk struct {
	Target   string `dbus:"target"`
	Source   string `dbus:"source"`
	Format   string `dbus:"format"`
	Size     uint64 `dbus:"size"`
	Included bool   `dbus:"included"`
	Cause    string `dbus:"cause"`
}

// EffectiveSetting is one of Domain.ListSettings.
type EffectiveSetting struct {
	Key    string `dbus:"key"`
	Value  string `dbus:"value"`
	Source string `dbus:"source"`
}

// PruneEntry is one of Domain.Prune.
type PruneEntry struct {
	Repository  string      `dbus:"repository"`
	Backup      string      `dbus:"backup"`
	Created     time.Time   `dbus:"created"`
	StoredBytes uint64      `dbus:"stored_bytes"`
	Action      PruneAction `dbus:"action"`
	Into        string      `dbus:"into"`
	Reasons     []string    `dbus:"reasons"`
}

// DomainTracking is one of Domain.ListTracking.
type DomainTracking struct {
	Repository string    `dbus:"repository"`
	Offering   string    `dbus:"offering"`
	Chain      string    `dbus:"chain"`
	Target     string    `dbus:"target"`
	Tracking   Tracking  `dbus:"tracking"`
	Cause      string    `dbus:"cause"`
	Since      time.Time `dbus:"since"`
}

// Mark is one of Domain.ListMarks.
type Mark struct {
	Time   time.Time `dbus:"time"`
	Target string    `dbus:"target"`
	Cause  string    `dbus:"cause"`
	Detail string    `dbus:"detail"`
}

// DomainProperties are those of org.virtbackup1.Domain.
type DomainProperties struct {
	UUID           string       `dbus:"Uuid"`
	Name           string       `dbus:"Name"`
	State          string       `dbus:"State"`
	Offering       string       `dbus:"Offering"`
	Protection     Protection   `dbus:"Protection"`
	LastBackup     string       `dbus:"LastBackup"`
	LastBackupTime time.Time    `dbus:"LastBackupTime"`
	LastError      string       `dbus:"LastError"`
	NextRun        time.Time    `dbus:"NextRun"`
	Chain          string       `dbus:"Chain"`
	ChainLength    uint32       `dbus:"ChainLength"`
	Job            string       `dbus:"Job"`
	Disks          []DomainDisk `dbus:"Disks"`
}

// ChainProperties are those of org.virtbackup1.Chain.
type ChainProperties struct {
	ID          string     `dbus:"Id"`
	DomainUUID  string     `dbus:"DomainUuid"`
	DomainName  string     `dbus:"DomainName"`
	Repository  string     `dbus:"Repository"`
	Offering    string     `dbus:"Offering"`
	State       ChainState `dbus:"State"`
	Cause       string     `dbus:"Cause"`
	Length      uint32     `dbus:"Length"`
	Backups     []string   `dbus:"Backups"`
	StoredBytes uint64     `dbus:"StoredBytes"`
	Created     time.Time  `dbus:"Created"`
}

// BackupDisk is one of BackupProperties.Disks.
type BackupDisk struct {
	Target      string     `dbus:"target"`
	File        string     `dbus:"file"`
	Format      string     `dbus:"format"`
	Size        uint64     `dbus:"size"`
	StoredBytes uint64     `dbus:"stored_bytes"`
	DataBytes   uint64     `dbus:"data_bytes"`
	ReadBytes   uint64     `dbus:"read_bytes"`
	Kind        BackupKind `dbus:"kind"`
	Changes     Tracking   `dbus:"changes"`
	Tracking    Tracking   `dbus:"tracking"`
	Cause       string     `dbus:"cause"`
}

// BackupDamage is one of BackupProperties.Damage.
type BackupDamage struct {
	Target string `dbus:"target"`
	Offset uint64 `dbus:"offset"`
	Length uint64 `dbus:"length"`
	Image  string `dbus:"image"`
	Donor  string `dbus:"donor"`
}

// BackupProperties are those of org.virtbackup1.Backup.
type BackupProperties struct {
	ID               string           `dbus:"Id"`
	DomainUUID       string           `dbus:"DomainUuid"`
	DomainName       string           `dbus:"DomainName"`
	Repository       string           `dbus:"Repository"`
	Offering         string           `dbus:"Offering"`
	Chain            string           `dbus:"Chain"`
	Parent           string           `dbus:"Parent"`
	Kind             BackupKind       `dbus:"Kind"`
	Isolated         bool             `dbus:"Isolated"`
	State            BackupState      `dbus:"State"`
	Consistency      Consistency      `dbus:"Consistency"`
	Quiesce          Quiesce          `dbus:"Quiesce"`
	Shortfall        string           `dbus:"Shortfall"`
	Hold             string           `dbus:"Hold"`
	HeldUsec         uint64           `dbus:"HeldUsec"`
	Created          time.Time        `dbus:"Created"`
	Finished         time.Time        `dbus:"Finished"`
	SizeBytes        uint64           `dbus:"SizeBytes"`
	StoredBytes      uint64           `dbus:"StoredBytes"`
	DataBytes        uint64           `dbus:"DataBytes"`
	ReadBytes        uint64           `dbus:"ReadBytes"`
	Compression      Compression      `dbus:"Compression"`
	CompressionState CompressionState `dbus:"CompressionState"`
	CompressionError string           `dbus:"CompressionError"`
	Causes           []string         `dbus:"Causes"`
	Host             string           `dbus:"Host"`
	Version          string           `dbus:"Version"`
	Verified         time.Time        `dbus:"Verified"`
	ValidationResult ValidationResult `dbus:"ValidationResult"`
	ValidationStep   string           `dbus:"ValidationStep"`
	ValidationCause  string           `dbus:"ValidationCause"`
	Validated        time.Time        `dbus:"Validated"`
	Children         []string         `dbus:"Children"`
	Damage           []BackupDamage   `dbus:"Damage"`
	Disks            []BackupDisk     `dbus:"Disks"`
}

// ValidationRecord is one of Backup.ListValidations.
type ValidationRecord struct {
	ID            string              `dbus:"id"`
	Job           string              `dbus:"job"`
	Result        ValidationResult    `dbus:"result"`
	Step          string              `dbus:"step"`
	Cause         string              `dbus:"cause"`
	Started       time.Time           `dbus:"started"`
	Finished      time.Time           `dbus:"finished"`
	HasScreenshot bool                `dbus:"has_screenshot"`
	Findings      []ValidationFinding `dbus:"findings"`
}

// ValidationFinding is one of ValidationRecord.Findings.
type ValidationFinding struct {
	Step     string            `dbus:"step"`
	Verdict  ValidationVerdict `dbus:"verdict"`
	Cause    string            `dbus:"cause"`
	Output   string            `dbus:"output"`
	TookUsec uint64            `dbus:"took_usec"`
}

// JobProperties are those of org.virtbackup1.Job.
type JobProperties struct {
	ID           string    `dbus:"Id"`
	Operation    Operation `dbus:"Operation"`
	State        JobState  `dbus:"State"`
	Phase        string    `dbus:"Phase"`
	Progress     float64   `dbus:"Progress"`
	BytesDone    uint64    `dbus:"BytesDone"`
	BytesTotal   uint64    `dbus:"BytesTotal"`
	Rate         uint64    `dbus:"Rate"`
	ETA          time.Time `dbus:"Eta"`
	DomainUUID   string    `dbus:"DomainUuid"`
	DomainName   string    `dbus:"DomainName"`
	Repository   string    `dbus:"Repository"`
	Offering     string    `dbus:"Offering"`
	Backup       string    `dbus:"Backup"`
	Error        ErrorName `dbus:"Error"`
	ErrorMessage string    `dbus:"ErrorMessage"`
	Warnings     []string  `dbus:"Warnings"`
	UID          uint32    `dbus:"Uid"`
	Waiting      string    `dbus:"Waiting"`
	Priority     uint32    `dbus:"Priority"`
	Origin       JobOrigin `dbus:"Origin"`
	Schedule     string    `dbus:"Schedule"`
	Parent       string    `dbus:"Parent"`
	Attempt      uint32    `dbus:"Attempt"`
	Attempts     uint32    `dbus:"Attempts"`
	NextTry      time.Time `dbus:"NextTry"`
	Unit         string    `dbus:"Unit"`
	Created      time.Time `dbus:"Created"`
	Started      time.Time `dbus:"Started"`
	Finished     time.Time `dbus:"Finished"`
}

// Err returns what the job failed with; nil unless it failed or was cancelled.
func (p JobProperties) Err() error {
	switch p.State {
	case JobFailed:
		return &Error{Name: p.Error, Message: p.ErrorMessage}
	case JobCancelled:
		return Errorf(ErrCancelled, "the job was cancelled")
	}
	return nil
}

// Setting is one of Manager.EffectiveConfiguration.
type Setting struct {
	Key    string `dbus:"key"`
	Value  string `dbus:"value"`
	Source string `dbus:"source"`
}

// Usage is one of Manager.ListUsage.
type Usage struct {
	Of             string    `dbus:"of"`
	Name           string    `dbus:"name"`
	Backups        uint32    `dbus:"backups"`
	Chains         uint32    `dbus:"chains"`
	StoredBytes    uint64    `dbus:"stored_bytes"`
	ProtectedBytes uint64    `dbus:"protected_bytes"`
	Newest         time.Time `dbus:"newest"`
}

// Quota is one of Manager.ListQuotas.
type Quota struct {
	Kind        QuotaKind `dbus:"kind"`
	Of          string    `dbus:"of"`
	Name        string    `dbus:"name"`
	Bytes       uint64    `dbus:"bytes"`
	Backups     uint32    `dbus:"backups"`
	Chains      uint32    `dbus:"chains"`
	UsedBytes   uint64    `dbus:"used_bytes"`
	UsedBackups uint32    `dbus:"used_backups"`
	UsedChains  uint32    `dbus:"used_chains"`
}

// Inhibitor is one of Manager.ListInhibitors.
type Inhibitor struct {
	ID    string    `dbus:"id"`
	What  []string  `dbus:"what"`
	Who   string    `dbus:"who"`
	Why   string    `dbus:"why"`
	UID   uint32    `dbus:"uid"`
	Since time.Time `dbus:"since"`
}

// LogMessage is one of Job.Log.
type LogMessage struct {
	Time    time.Time `dbus:"time"`
	Level   string    `dbus:"level"`
	Message string    `dbus:"message"`
}

// PlanDisk is one of RestorePlan.Disks.
type PlanDisk struct {
	Target      string   `dbus:"target"`
	Destination string   `dbus:"destination"`
	Format      string   `dbus:"format"`
	Size        uint64   `dbus:"size"`
	StoredBytes uint64   `dbus:"stored_bytes"`
	Images      []string `dbus:"images"`
}

// RestorePlan is what Backup.PlanRestore returns.
type RestorePlan struct {
	InPlace    bool       `dbus:"in_place"`
	DomainName string     `dbus:"domain_name"`
	DomainUUID string     `dbus:"domain_uuid"`
	Disks      []PlanDisk `dbus:"disks"`
	Interfaces []string   `dbus:"interfaces"`
	Warnings   []string   `dbus:"warnings"`
	Refusals   []string   `dbus:"refusals"`
}

// Ref names the object.
func (ManagerProperties) Ref() Ref { return Ref{Kind: KindManager} }

// Ref names the object.
func (p RepositoryProperties) Ref() Ref { return Ref{KindRepository, p.ID} }

// Ref names the object.
func (p OfferingProperties) Ref() Ref { return Ref{KindOffering, p.ID} }

// Ref names the object.
func (p ScheduleProperties) Ref() Ref { return Ref{KindSchedule, p.ID} }

// Ref names the object.
func (p DomainProperties) Ref() Ref { return Ref{KindDomain, p.UUID} }

// Ref names the object.
func (p ChainProperties) Ref() Ref { return Ref{KindChain, p.ID} }

// Ref names the object.
func (p BackupProperties) Ref() Ref { return Ref{KindBackup, p.ID} }

// Ref names the object.
func (p JobProperties) Ref() Ref { return Ref{KindJob, p.ID} }

// Details has nothing to tell.
func (ManagerProperties) Details() map[string]string { return map[string]string{} }

// Details names the repository.
func (p RepositoryProperties) Details() map[string]string { return details("", "", p.Name, "", "") }

// Details names the offering and its repository.
func (p OfferingProperties) Details() map[string]string {
	return details("", "", p.Repository, p.Name, "")
}

// Details names the domain or offering, and the repository if it has one of its own.
func (p ScheduleProperties) Details() map[string]string {
	return details(p.DomainName, p.DomainUUID, p.Repository, p.Offering, "")
}

// Details names the domain and its offering.
func (p DomainProperties) Details() map[string]string {
	return details(p.Name, p.UUID, "", p.Offering, "")
}

// Details names the domain, repository and offering of the chain.
func (p ChainProperties) Details() map[string]string {
	return details(p.DomainName, p.DomainUUID, p.Repository, p.Offering, "")
}

// Details names the backup, and its domain, repository and offering.
func (p BackupProperties) Details() map[string]string {
	return details(p.DomainName, p.DomainUUID, p.Repository, p.Offering, p.ID)
}

// Details names what the job is about.
func (p JobProperties) Details() map[string]string {
	return details(p.DomainName, p.DomainUUID, p.Repository, p.Offering, p.Backup)
}

// The keys of Record.Details, as a polkit rule looks them up.
const (
	DetailDomainName = "domain.name"
	DetailDomainUUID = "domain.uuid"
	DetailRepository = "repository"
	DetailOffering   = "offering"
	DetailBackup     = "backup"
)

func details(domainName, domainUUID, repository, offering, backup string) map[string]string {
	all := map[string]string{
		DetailDomainName: domainName, DetailDomainUUID: domainUUID, DetailRepository: repository,
		DetailOffering: offering, DetailBackup: backup,
	}
	for k, v := range all {
		if v == "" {
			delete(all, k)
		}
	}
	return all
}
