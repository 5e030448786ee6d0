/* What a test puts before the C library of a process: at the nth call that changes anything outside, the process dies, or stands still, or
 * the disk is full from there on. FAULT_AT says which call, from 1; FAULT says `kill`, `stop`, `full` or `count`; the file FAULT_MARK is made when
 * the disk is full for the first time, and holds the number of calls at the end where they are counted. What goes to the terminal does not count.
 * With FAULT_LOG the calls on files are written there, one a line; with FAULT_FSYNC the fsync of that number fails, from 1. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long at, count, full, strikes;

__attribute__((constructor)) static void read_environment(void) {
  const char *nth = getenv("FAULT_AT"), *what = getenv("FAULT");
  at = nth ? atol(nth) : 0;
  full = what && !strcmp(what, "full");
  strikes = what && !strcmp(what, "stop") ? SIGSTOP : SIGKILL;
}

__attribute__((destructor)) static void write_count(void) {
  const char *what = getenv("FAULT"), *mark = getenv("FAULT_MARK");
  if (!what || strcmp(what, "count") || !mark) return;
  int fd = creat(mark, 0600);
  dprintf(fd, "%ld", count);
  close(fd);
}

/* Notes a call, past what this library stands before. */
static void note(const char *call, const char *from, const char *to) {
  const char *log = getenv("FAULT_LOG");
  if (!log) return;
  char line[9000];
  int length = snprintf(line, sizeof line, "%s\t%s\t%s\n", call, from, to);
  int fd = open(log, O_WRONLY | O_CREAT | O_APPEND, 0600);
  syscall(SYS_write, fd, line, length);
  close(fd);
}

static void note_file(const char *call, int fd) {
  char name[64], path[4096];
  if (!getenv("FAULT_LOG")) return;
  snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(name, path, sizeof path - 1);
  if (length < 0) return;
  path[length] = 0;
  if (path[0] == '/') note(call, path, "");
}

/* Whether the call fails. */
static int touched(void) {
  if (!at) return 0;
  long now = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
  if (!full && now == at) kill(getpid(), strikes);
  if (full && now == at && getenv("FAULT_MARK")) close(creat(getenv("FAULT_MARK"), 0600));
  return full && now >= at;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define COUNTED(type, name, parameters, arguments) \
  type name parameters { if (!full) touched(); return REAL(name) arguments; }
#define MAKING(name, parameters, arguments, from, to) \
  int name parameters { note(#name, from, to); if (touched()) { errno = ENOSPC; return -1; } return REAL(name) arguments; }

/* What is written to counts if it is a file or a socket, and not what wakes a thread; a full disk is files only. */
static int counts(int fd) {
  struct stat about;
  return fd > 2 && !fstat(fd, &about) && (S_ISREG(about.st_mode) || (!full && S_ISSOCK(about.st_mode)));
}
#define FILLING(type, name, parameters, arguments) \
  type name parameters { note_file(#name, fd); if (counts(fd) && touched()) { errno = ENOSPC; return -1; } return REAL(name) arguments; }

FILLING(ssize_t, write, (int fd, const void *bytes, size_t length), (fd, bytes, length))
FILLING(ssize_t, writev, (int fd, const struct iovec *parts, int number), (fd, parts, number))
FILLING(ssize_t, pwrite, (int fd, const void *bytes, size_t length, off_t offset), (fd, bytes, length, offset))
FILLING(ssize_t, pwrite64, (int fd, const void *bytes, size_t length, off64_t offset), (fd, bytes, length, offset))
FILLING(int, ftruncate, (int fd, off_t length), (fd, length))
FILLING(int, ftruncate64, (int fd, off64_t length), (fd, length))
static long flushes;
int fsync(int fd) {
  note_file("fsync", fd);
  const char *fails = getenv("FAULT_FSYNC");
  if (fails && __atomic_add_fetch(&flushes, 1, __ATOMIC_SEQ_CST) == atol(fails)) {
    note_file("failed", fd);
    errno = EIO;
    return -1;
  }
  if (counts(fd) && touched()) { errno = ENOSPC; return -1; }
  return REAL(fsync)(fd);
}
FILLING(int, fdatasync, (int fd), (fd))
MAKING(mkdir, (const char *path, mode_t mode), (path, mode), path, "")
MAKING(link, (const char *from, const char *to), (from, to), from, to)
MAKING(linkat, (int old, const char *from, int new, const char *to, int flags), (old, from, new, to, flags), from, to)
MAKING(symlink, (const char *to, const char *path), (to, path), to, path)
MAKING(symlinkat, (const char *to, int folder, const char *path), (to, folder, path), to, path)
MAKING(rename, (const char *from, const char *to), (from, to), from, to)
MAKING(renameat, (int old, const char *from, int new, const char *to), (old, from, new, to), from, to)
COUNTED(int, rmdir, (const char *path), (path))
COUNTED(int, unlinkat, (int folder, const char *path, int flags), (folder, path, flags))
COUNTED(int, unlink, (const char *path), (path))
COUNTED(int, connect, (int socket, const struct sockaddr *address, socklen_t length), (socket, address, length))
COUNTED(ssize_t, send, (int socket, const void *bytes, size_t length, int flags), (socket, bytes, length, flags))
COUNTED(ssize_t, sendto,
        (int socket, const void *bytes, size_t length, int flags, const struct sockaddr *to, socklen_t size),
        (socket, bytes, length, flags, to, size))
COUNTED(ssize_t, sendmsg, (int socket, const struct msghdr *message, int flags), (socket, message, flags))
