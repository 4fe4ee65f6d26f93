"""Numbers of the system calls that `treepo.rewards.confinement` refuses, and of those it looks at."""

_BOTH = """
seccomp 317 277
open 2 -
openat 257 56
clone 56 220
openat2 437 437
clone3 435 435
socket 41 198
socketpair 53 199
connect 42 203
bind 49 200
listen 50 201
accept 43 202
accept4 288 242
sendto 44 206
sendmsg 46 211
sendmmsg 307 269
execve 59 221
execveat 322 281
fork 57 -
vfork 58 -
creat 85 -
unlink 87 -
unlinkat 263 35
rename 82 -
renameat 264 38
renameat2 316 276
mkdir 83 -
mkdirat 258 34
rmdir 84 -
link 86 -
linkat 265 37
symlink 88 -
symlinkat 266 36
mknod 133 -
mknodat 259 33
chmod 90 -
fchmod 91 52
fchmodat 268 53
fchmodat2 452 452
chown 92 -
fchown 93 55
lchown 94 -
fchownat 260 54
truncate 76 45
ftruncate 77 46
setxattr 188 5
lsetxattr 189 6
fsetxattr 190 7
removexattr 197 14
lremovexattr 198 15
fremovexattr 199 16
setxattrat 463 463
removexattrat 466 466
utime 132 -
utimes 235 -
futimesat 261 -
utimensat 280 88
mount 165 40
umount2 166 39
pivot_root 155 41
chroot 161 51
unshare 272 97
setns 308 268
open_by_handle_at 304 265
ptrace 101 117
process_vm_readv 310 270
process_vm_writev 311 271
kill 62 129
tkill 200 130
tgkill 234 131
rt_sigqueueinfo 129 138
rt_tgsigqueueinfo 297 240
pidfd_open 434 434
pidfd_getfd 438 438
pidfd_send_signal 424 424
io_uring_setup 425 425
io_uring_enter 426 426
io_uring_register 427 427
bpf 321 280
perf_event_open 298 241
userfaultfd 323 282
add_key 248 217
request_key 249 218
keyctl 250 219
shmget 29 194
shmat 30 196
mq_open 240 180
setrlimit 160 164
prlimit64 302 261
"""
_ROWS = [line.split() for line in _BOTH.split("\n") if line]

NUMBERS = {
    machine: {row[0]: int(row[column]) for row in _ROWS if row[column] != "-"}
    for column, machine in enumerate(("x86_64", "aarch64"), start=1)
}
"""By machine and name; a name that a machine lacks is a call that it lacks."""
MISSING = ("openat2", "clone3")
"""Calls that seem not to exist: libraries then use the older ones, whose arguments a filter can see."""
DENIED = tuple(row[0] for row in _ROWS if row[0] not in ("seccomp", "open", "openat", "clone", *MISSING))
"""Calls that are refused whatever their arguments."""
