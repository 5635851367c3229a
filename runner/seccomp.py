"""The seccomp profile: what a container's processes may ask of the kernel.  Deny by default.

clone3 does not exist (ENOSYS), so that the C library falls back to clone, whose flags can be looked at.

Source: config-linux.md of the OCI runtime specification; seccomp(2); man pages of the calls.
A profile of the user's, in the form that docker and podman read, is resolved by its conditions.
"""

from __future__ import annotations

import json
import os

from cafs import atomic
from cafs.errors import FormatError, os_error, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_EPERM, _ENOSYS = 1, 38
_KEPT = ("defaultAction", "defaultErrnoRet", "flags", "listenerPath", "listenerMetadata")
_PROFILE_MAX = 1 << 22
_NATIVE = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}
_NARROW = {"x86_64": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"], "aarch64": ["SCMP_ARCH_ARM"]}
"""What else programs may be built for: a call by another machine's rules, which no filter knows, is SIGSYS."""
_SHORT = {"x86_64": "amd64", "aarch64": "arm64"}
_NEW_NAMESPACES = 0x7E020000
"""All CLONE_NEW… flags but CLONE_NEWTIME, which clone(2) does not take."""

_ALLOWED = """
_llseek _newselect accept accept4 access adjtimex alarm bind brk cachestat capget capset chdir chmod chown chown32
clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep
clock_nanosleep_time64 close close_range connect copy_file_range creat dup dup2 dup3 epoll_create epoll_create1 epoll_ctl
epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 execve execveat exit exit_group faccessat
faccessat2 fadvise64 fadvise64_64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl
fcntl64 fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat fstat64 fstatat64 fstatfs fstatfs64 fsync
ftruncate ftruncate64 futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake futimesat get_robust_list
get_thread_area getcpu getcwd getdents getdents64 getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32
getitimer getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid getresgid32 getresuid getresuid32
getrlimit getrusage getsid getsockname getsockopt gettid gettimeofday getuid getuid32 getxattr getxattrat inotify_add_watch
inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup
io_submit ioctl ioprio_get ioprio_set ipc kill landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown
lchown32 lgetxattr link linkat listen listmount listxattr listxattrat llistxattr lremovexattr lseek lsetxattr lstat lstat64
madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap
mmap2 mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend
mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync munlock munlockall munmap name_to_handle_at
nanosleep newfstatat open openat openat2 pause pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll
ppoll ppoll_time64 prctl pread64 preadv preadv2 prlimit64 process_mrelease process_vm_readv process_vm_writev pselect6
pselect6_time64 ptrace pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv recv recvfrom recvmmsg
recvmmsg_time64 recvmsg remap_file_pages removexattr removexattrat rename renameat renameat2 restart_syscall riscv_hwprobe
rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait
rt_sigtimedwait_time64 rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr
sched_getparam sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr
sched_setparam sched_setscheduler sched_yield seccomp select semctl semget semop semtimedop semtimedop_time64 send sendfile
sendfile64 sendmmsg sendmsg sendto set_robust_list set_thread_area set_tid_address setfsgid setfsgid32 setfsuid setfsuid32
setgid setgid32 setgroups setgroups32 setitimer setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid
setresuid32 setreuid setreuid32 setrlimit setsid setsockopt setuid setuid32 setxattr setxattrat shmat shmctl shmdt shmget
shutdown sigaltstack signalfd signalfd4 sigprocmask sigreturn socketpair splice stat stat64 statfs statfs64
statmount statx symlink symlinkat sync sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete
timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd_create timerfd_gettime timerfd_gettime64
timerfd_settime timerfd_settime64 times tkill truncate truncate64 ugetrlimit umask uname unlink unlinkat uretprobe utime
utimensat utimensat_time64 utimes vfork vmsplice wait4 waitid waitpid write writev
"""
_BY_MACHINE = {
    "x86_64": "arch_prctl modify_ldt",
    "aarch64": "arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush set_tls sync_file_range2",
}
_BY_CAPABILITY = {
    "CAP_BPF": "bpf",
    "CAP_DAC_READ_SEARCH": "open_by_handle_at",
    "CAP_PERFMON": "perf_event_open",
    "CAP_SYSLOG": "syslog",
    "CAP_SYS_ADMIN": "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie lsm_get_self_attr "
    "lsm_list_modules lsm_set_self_attr mount mount_setattr "
    "move_mount open_tree perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog umount umount2 unshare",
    "CAP_SYS_BOOT": "reboot",
    "CAP_SYS_CHROOT": "chroot",
    "CAP_SYS_MODULE": "delete_module finit_module init_module",
    "CAP_SYS_NICE": "get_mempolicy mbind set_mempolicy set_mempolicy_home_node",
    "CAP_SYS_PACCT": "acct",
    "CAP_SYS_PTRACE": "kcmp pidfd_getfd process_madvise",
    "CAP_SYS_RAWIO": "ioperm iopl",
    "CAP_SYS_TIME": "clock_settime clock_settime64 settimeofday stime",
    "CAP_SYS_TTY_CONFIG": "vhangup",
}
_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
_FAMILIES = (13, 14, 15, 16, 17, 18, 21, 22, 24, *range(26, 34), 35, 36, 39, *range(41, 46))
"""Of sockets, beside those below 12: neither AF_ALG (38), by which a page cache was written to (CVE-2026-31431), and ours is
every container's, nor AF_VSOCK (40), which reaches the hypervisor, nor what the kernel has given up."""


def profile(capabilities: list[str]) -> dict[str, Any] | None:
    """Ours.  capabilities: of the bounding set.  None on a machine whose calls we do not know."""
    machine = os.uname().machine
    if machine not in _NATIVE:
        return None
    more = {call for name in capabilities for call in _BY_CAPABILITY.get(name, "").split()}
    rules = [_allow(sorted({*_ALLOWED.split(), *_BY_MACHINE[machine].split(), *more}))]
    rules += [_allow(["personality"], index=0, value=value, op="SCMP_CMP_EQ") for value in _PERSONALITIES]
    rules.append(_allow(["socket"], index=0, value=12, op="SCMP_CMP_LT"))
    rules += [_allow(["socket"], index=0, value=family, op="SCMP_CMP_EQ") for family in _FAMILIES]
    # Its family is behind a pointer.  Not EPERM: runc leaves out what is the default, and libseccomp then allows the call.
    rules.append({"names": ["socketcall"], "action": "SCMP_ACT_ERRNO", "errnoRet": _ENOSYS})
    if "clone" not in more:
        rules.append(_allow(["clone"], index=0, value=_NEW_NAMESPACES, valueTwo=0, op="SCMP_CMP_MASKED_EQ"))
        rules.append({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": _ENOSYS})
    machines = [_NATIVE[machine], *_NARROW[machine]]
    return {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": _EPERM, "architectures": machines, "syscalls": rules}


def _allow(names: list[str], **argument: object) -> dict[str, Any]:
    return {"names": names, "action": "SCMP_ACT_ALLOW"} | ({"args": [argument]} if argument else {})


def load(path: str, capabilities: list[str]) -> dict[str, Any]:
    """A profile of the user's: docker's form, resolved for this machine and these capabilities.  Raises CafsError."""
    try:
        found = json.loads(atomic.read_file(path, _PROFILE_MAX))
        if not isinstance(found, dict) or "defaultAction" not in found:
            raise ValueError
        rules = [_plain(rule) for rule in found.get("syscalls") or [] if _applies(rule, capabilities)]
        result = {key: found[key] for key in _KEPT if key in found}
        if found.get("architectures") and found.get("archMap"):
            raise ValueError  # as docker has it: it would not be plain which counts
        machines = found.get("architectures") or _machines(found)
    except OSError as error:
        raise os_error(f"cannot read seccomp profile {quote(path)}", error) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise FormatError(f"{quote(path)} is not a seccomp profile") from None
    return result | {"architectures": machines, "syscalls": rules}


def _machines(found: dict[str, Any]) -> list[str]:
    native = _NATIVE.get(os.uname().machine, "")
    for row in found.get("archMap") or []:
        if row["architecture"] == native:
            return [native, *(row.get("subArchitectures") or [])]
    return [native]


def _plain(rule: dict[str, Any]) -> dict[str, Any]:
    names = rule.get("names") or [rule["name"]]
    kept = {key: rule[key] for key in ("action", "errnoRet") if rule.get(key) is not None}
    return {"names": names} | kept | ({"args": rule["args"]} if rule.get("args") else {})


def _applies(rule: dict[str, Any], capabilities: list[str]) -> bool:
    """By includes and excludes: capabilities, machines, oldest kernel."""
    machine, held = _SHORT.get(os.uname().machine, ""), set(capabilities)
    wanted, unwanted = rule.get("includes") or {}, rule.get("excludes") or {}
    if not set(wanted.get("caps") or []) <= held or held & set(unwanted.get("caps") or []):
        return False
    if (wanted.get("arches") and machine not in wanted["arches"]) or machine in (unwanted.get("arches") or []):
        return False
    if unwanted.get("minKernel") and _kernel() >= _version(unwanted["minKernel"]):
        return False
    return not wanted.get("minKernel") or _kernel() >= _version(wanted["minKernel"])


def _kernel() -> tuple[int, int]:
    return _version(os.uname().release)


def _version(text: str) -> tuple[int, int]:
    major, _, rest = text.partition(".")
    digits = "".join(c if c.isdigit() else " " for c in rest).split()
    return int(major), int(digits[0]) if digits else 0


def chosen(options: Any, capabilities: list[str]) -> dict[str, Any] | None:
    """By --security-opt; None: unconfined.  Raises CafsError."""
    wanted = next((text for text in reversed(options.all("security-opt")) if text.startswith(("seccomp=", "seccomp:"))), "")[8:]
    if wanted == "unconfined" or (options.has("privileged") and not wanted):
        return None
    if wanted in ("", "builtin"):
        return profile(capabilities)
    return load(wanted, capabilities)
