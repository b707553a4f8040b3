// Package nastest holds the tests of repositories on shared storage, with real
// servers and this kernel's clients of NFS and SMB. They run in the virtual
// machine of the NAS lab (build tag nas, "make test-nas"), where a processor is
// some ten times as slow as elsewhere: what does not need that is in labtest.
package nastest
