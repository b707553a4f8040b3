package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/virtbackup/virtbackup/dbus"
)

func (a *app) repositoryCommand() *cobra.Command {
	list := &cobra.Command{Use: "list", Short: "List repositories", Args: cobra.NoArgs}
	list.RunE = a.verb(func(ctx context.Context, c *dbus.Client, _ []string) error {
		all, err := c.Repositories(ctx)
		if err != nil {
			return err
		}
		return a.show(all, func(p *page) { repositoryTable(p, all) })
	})
	show := a.repositoryVerb("show", "Show a repository", func(ctx context.Context, c *dbus.Client, r dbus.RepositoryProperties) error {
		return a.show(r, func(p *page) { repositoryPage(p, r) })
	})
	var depth dbus.CheckRepositoryOptions
	check := a.repositoryVerb("check", "Look at a repository again, or at all backups in it", func(ctx context.Context, c *dbus.Client, r dbus.RepositoryProperties) error {
		job, err := c.CheckRepository(ctx, r.ID, depth)
		if err != nil {
			return err
		}
		return a.finishAndTell(ctx, c, job)
	})
	addChoice(check, &depth.Depth, "depth", "what is looked at")
	var what dbus.ScanRepositoryOptions
	scan := a.repositoryVerb("scan", "Have the catalog know all backups in a repository", func(ctx context.Context, c *dbus.Client, r dbus.RepositoryProperties) error {
		job, err := c.ScanRepository(ctx, r.ID, what)
		if err != nil {
			return err
		}
		return a.finishAndTell(ctx, c, job)
	})
	scan.Flags().BoolVar(&what.ImportForeign, "import-foreign", false, "take backups of other hosts, too: whoever can write there can have forged them")
	scan.Flags().BoolVar(&what.DryRun, "dry-run", false, "only tell what would be taken")
	var forget dbus.RemoveRepositoryOptions
	remove := a.repositoryVerb("remove", "Forget a repository; its files stay", func(ctx context.Context, c *dbus.Client, r dbus.RepositoryProperties) error {
		if err := c.RemoveRepository(ctx, r.ID, forget); err != nil {
			return err
		}
		a.say("Repository %s is forgotten; its files are still in %s.", r.Name, place(r))
		return a.jsonRecord(r, nil)
	})
	remove.Flags().BoolVar(&forget.ForgetBackups, "forget-backups", false, "forget its backups too; \"repository scan\" finds them again")
	return group("repository", "Manage repositories", a.repositoryAddCommand(), a.repositoryUpdateCommand(), list, show, check, scan, remove)
}

// repositoryVerb makes a verb that takes a repository.
func (a *app) repositoryVerb(name, short string, f func(context.Context, *dbus.Client, dbus.RepositoryProperties) error) *cobra.Command {
	cmd := &cobra.Command{Use: name + " REPOSITORY", Short: short, Args: cobra.ExactArgs(1), ValidArgsFunction: a.names(1, repositoryNames)}
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, args []string) error {
		id, err := findRepository(ctx, c, args[0])
		if err != nil {
			return err
		}
		r, err := dbus.Get[dbus.RepositoryProperties](ctx, c, id)
		if err != nil {
			return err
		}
		return f(ctx, c, r)
	})
	return cmd
}

// storageFlags are those of where a repository is and how it is reached.
type storageFlags struct {
	options     []string
	credentials string
	minimumFree string
}

func addStorage(cmd *cobra.Command) *storageFlags {
	s := &storageFlags{}
	f := cmd.Flags()
	f.StringSliceVarP(&s.options, "mount-option", "o", nil, "`OPTION` of the mount, as vers=4.2; more than once, or with commas between")
	f.StringVar(&s.credentials, "credentials", "", "`FILE` with the credentials, - for standard input")
	f.StringVar(&s.minimumFree, "minimum-free", "", "leave this `SIZE` free, as 10G")
	complete(cmd, "mount-option", cobra.NoFileCompletions)
	complete(cmd, "minimum-free", cobra.NoFileCompletions)
	return s
}

// free returns the size to leave free; nil if none was given.
func (s *storageFlags) free() (*uint64, error) {
	if s.minimumFree == "" {
		return nil, nil
	}
	n, err := parseSize(s.minimumFree)
	return &n, err
}

// secret reads the credentials. They are in no argument, as others see those.
func (s *storageFlags) secret(a *app) (string, error) {
	const limit = 64 << 10
	from := a.in
	switch s.credentials {
	case "":
		return "", nil
	case "-":
	default:
		f, err := os.Open(s.credentials)
		if err != nil {
			return "", fmt.Errorf("cannot read credentials: %w", err)
		}
		defer f.Close()
		from = f
	}
	b, err := io.ReadAll(io.LimitReader(from, limit))
	if err != nil {
		return "", fmt.Errorf("cannot read credentials: %w", err)
	}
	return string(b), nil
}

func (a *app) repositoryAddCommand() *cobra.Command {
	var o dbus.CreateRepositoryOptions
	var typ string
	cmd := &cobra.Command{
		Use:   "add NAME DIRECTORY|ADDRESS",
		Short: "Make a directory or other storage a repository, or take one that is",
		Example: `  virtbackupctl repository add nas /mnt/backup
  virtbackupctl repository add nas --type nfs nas.example.org:/export/backup -o vers=4.2
  virtbackupctl repository add nas --type cifs //nas.example.org/backup --credentials FILE
  virtbackupctl repository add disk --type mount --file-system xfs LABEL=backup`,
		Args: cobra.ExactArgs(2),
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
			if len(args) == 1 && typ == "dir" {
				return nil, cobra.ShellCompDirectiveFilterDirs
			}
			return nil, cobra.ShellCompDirectiveNoFileComp
		},
	}
	f := cmd.Flags()
	f.StringVar(&typ, "type", "dir", "kind of storage: dir, nfs, cifs, cephfs, mount")
	f.StringVar(&o.FileSystem, "file-system", "", "`NAME` of the file system, of type mount")
	f.BoolVar(&o.Existing, "existing", false, "refuse what is no repository yet")
	complete(cmd, "type", fixed("dir", "nfs", "cifs", "cephfs", "mount"))
	complete(cmd, "file-system", fixed("btrfs", "ext4", "gfs2", "ocfs2", "virtiofs", "xfs"))
	s := addStorage(cmd)
	cmd.PreRunE = func(*cobra.Command, []string) (err error) {
		o.MinimumFree, err = s.free()
		return err
	}
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, args []string) error {
		var err error
		if o.Credentials, err = s.secret(a); err != nil {
			return err
		}
		o.MountOptions = s.options
		_, job, err := c.CreateRepository(ctx, args[0], typ, args[1], o)
		if err != nil {
			return err
		}
		return a.finishOne(ctx, c, job)
	})
	return cmd
}

func (a *app) repositoryUpdateCommand() *cobra.Command {
	var address string
	var s *storageFlags
	var cmd *cobra.Command
	cmd = a.repositoryVerb("update", "Change where a repository is, or how it is reached", func(ctx context.Context, c *dbus.Client, r dbus.RepositoryProperties) error {
		var o dbus.UpdateRepositoryOptions
		var err error
		if o.MinimumFree, err = s.free(); err != nil {
			return &usageError{err}
		}
		if cmd.Flags().Changed("address") {
			o.Address = &address
		}
		if cmd.Flags().Changed("mount-option") {
			o.MountOptions = &s.options
		}
		if cmd.Flags().Changed("credentials") {
			secret, err := s.secret(a)
			if err != nil {
				return err
			}
			o.Credentials = &secret
		}
		if o == (dbus.UpdateRepositoryOptions{}) {
			return &usageError{errors.New("say what to change")}
		}
		job, err := c.UpdateRepository(ctx, r.ID, o)
		if err != nil {
			return err
		}
		return a.finishOne(ctx, c, job)
	})
	cmd.Flags().StringVar(&address, "address", "", "the same repository is now at this `ADDRESS`, or in this directory")
	complete(cmd, "address", cobra.NoFileCompletions)
	s = addStorage(cmd)
	return cmd
}

// place says where a repository is.
func place(r dbus.RepositoryProperties) string {
	return cmp.Or(r.Address, r.Path)
}

func repositoryTable(p *page, repositories []dbus.RepositoryProperties) {
	if len(repositories) == 0 && p.legend {
		p.line("No repositories. \"virtbackupctl repository add\" adds one.")
		return
	}
	var rows [][]string
	for _, r := range repositories {
		rows = append(rows, []string{r.Name, r.Type, string(r.State), size(r.FreeBytes), size(r.TotalBytes), place(r), r.StateMessage})
	}
	p.table([]string{"REPOSITORY", "TYPE", "STATE", ">FREE", ">TOTAL", "WHERE", "MESSAGE"}, rows)
}

func repositoryPage(p *page, r dbus.RepositoryProperties) {
	p.fields(
		"Repository", r.Name,
		"Id", r.ID,
		"Type", r.Type,
		"Address", r.Address,
		"File system", r.FileSystem,
		"Mount options", strings.Join(r.MountOptions, ","),
		"Credentials", credentials(r),
		"Path", r.Path,
		"Mounted", mounted(r),
		"State", string(r.State),
		"Message", r.StateMessage,
		"Since", moment(r.StateSince),
		"Free", fmt.Sprintf("%s of %s", size(r.FreeBytes), size(r.TotalBytes)),
		"Minimum free", size(r.MinimumFree),
		"Checked", moment(r.Checked),
		"Added", moment(r.Created),
	)
}

// credentials and mounted say nothing of a directory.
func credentials(r dbus.RepositoryProperties) string {
	if r.HasCredentials {
		return "kept"
	}
	return ""
}

func mounted(r dbus.RepositoryProperties) string {
	switch {
	case r.Address == "":
		return ""
	case r.Mounted:
		return "yes"
	}
	return "no, until it is needed"
}
