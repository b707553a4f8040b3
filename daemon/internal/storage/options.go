package storage

import (
	"maps"
	"regexp"
	"strings"
)

// option is one that a mount may have: a flag, or what its value matches.
type option struct {
	pattern *regexp.Regexp // nil for a flag
	like    string
}

func (o option) valued() bool { return o.pattern != nil }

func (o option) help(name string) string {
	if o.valued() {
		return name + "=" + o.like
	}
	return name
}

func flag() option { return option{} }

func one(words ...string) option {
	var quoted []string
	for _, w := range words {
		quoted = append(quoted, regexp.QuoteMeta(w))
	}
	return option{regexp.MustCompile(`^(` + strings.Join(quoted, "|") + `)$`), strings.Join(words, "|")}
}

func number() option { return option{regexp.MustCompile(`^[0-9]{1,9}$`), "NUMBER"} }

func name() option { return option{regexp.MustCompile(`^` + word + `$`), "NAME"} }

func path() option { return option{regexp.MustCompile(`^/?` + word + directory + `*$`), "PATH"} }

// options are those that a place of this type may have.
func (p Place) options() map[string]option {
	all := map[string]option{"noatime": flag(), "nodiratime": flag(), "relatime": flag(), "sync": flag()}
	maps.Copy(all, map[string]map[string]option{
		NFS: {
			"vers": one("3", "4", "4.0", "4.1", "4.2"), "proto": one("tcp", "tcp6", "rdma", "rdma6"), "port": number(),
			"sec": one("sys", "krb5", "krb5i", "krb5p"), "hard": flag(), "soft": flag(), "softreval": flag(),
			"timeo": number(), "retrans": number(), "retry": number(), "rsize": number(), "wsize": number(), "nconnect": number(),
			"actimeo": number(), "noac": flag(), "nolock": flag(), "noresvport": flag(), "nosharecache": flag(), "mountproto": one("tcp", "udp"),
		},
		CIFS: {
			"vers": one("2.1", "3", "3.0", "3.0.2", "3.02", "3.1.1"), "port": number(),
			"sec":  one("ntlmssp", "ntlmsspi", "krb5", "krb5i", "none"),
			"seal": flag(), "sign": flag(), "hard": flag(), "soft": flag(), "rsize": number(), "wsize": number(), "cache": one("none", "strict", "loose"),
			"actimeo": number(), "echo_interval": number(), "max_credits": number(), "nobrl": flag(), "noserverino": flag(), "serverino": flag(),
			"persistenthandles": flag(), "resilienthandles": flag(), "multichannel": flag(), "max_channels": number(),
		},
		CephFS: {
			"name": name(), "fs": name(), "mds_namespace": name(), "ms_mode": one("legacy", "crc", "secure", "prefer-crc", "prefer-secure"),
			"rsize": number(), "wsize": number(), "rasize": number(), "mount_timeout": number(), "recover_session": one("no", "clean"),
		},
		Mount: p.fileSystemOptions(),
	}[p.Type])
	return all
}

func (p Place) fileSystemOptions() map[string]option {
	return map[string]map[string]option{
		"ext4":  {"commit": number(), "discard": flag(), "lazytime": flag(), "errors": one("remount-ro", "continue")},
		"xfs":   {"nouuid": flag(), "discard": flag(), "inode64": flag(), "lazytime": flag()},
		"btrfs": {"subvol": path(), "commit": number(), "discard": one("async", "sync"), "compress": one("zstd", "lzo", "zlib", "no")},
	}[p.FileSystem]
}
