/* Loaded into the driver with LD_PRELOAD: numbers, records, fails or ends what it does to one folder.

   Operations are those that change FAULT_ROOT or what is below it, counted from 1 in the order in
   which they happen. FAULT_LOG gets a line for each, with the bytes in FAULT_LOG.data, and for what
   is said on stdout and stderr. FAULT_DO is one of:

     kill:N                SIGKILL instead of operation N
     tear:N                half of the bytes of write N, then SIGKILL
     stop:N                SIGSTOP before operation N
     fail:KIND:N:ERRNO     the Nth call of that kind fails; N+ means that one and all after it
     blind                 statvfs tells nothing, as on some network file systems

   several of them with a comma between. Only the first process is meant: its children never see
   FAULT_ROOT, and a fork of it is known by its pid. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { OPEN, CREATE, WRITE, TRUNCATE, FSYNC, LINK, RENAME, RENAMEAT2, UNLINK, MKDIR, NUM_KINDS };
static const char *const NAMES[NUM_KINDS] = {"open", "create", "write", "truncate", "fsync",
                                             "link", "rename", "renameat2", "unlink", "mkdir"};

struct fault { enum kind kind; long first; int is_lasting; int number; };

static char root[PATH_MAX];
static size_t root_length;
static pid_t driver;
static int log_fd = -1, data_fd = -1;
static long data_bytes, num_operations, num_calls[NUM_KINDS];
static long kill_at, tear_at, stop_at;
static int is_blind;
static struct fault faults[16];
static int num_faults;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static void read_fault(const char *text) {
    char kind[32], number[32];
    int error;
    if (sscanf(text, "fail:%31[^:]:%31[^:]:%d", kind, number, &error) != 3) abort();
    struct fault *fault = &faults[num_faults++];
    fault->first = atol(number);
    fault->is_lasting = strchr(number, '+') != NULL;
    fault->number = error;
    for (fault->kind = 0; strcmp(NAMES[fault->kind], kind) != 0;)
        if (++fault->kind == NUM_KINDS) abort();
}

static void read_plan(char *plan) {
    for (char *save, *word = strtok_r(plan, ",", &save); word; word = strtok_r(NULL, ",", &save)) {
        if (strncmp(word, "kill:", 5) == 0) kill_at = atol(word + 5);
        else if (strncmp(word, "tear:", 5) == 0) tear_at = atol(word + 5);
        else if (strncmp(word, "stop:", 5) == 0) stop_at = atol(word + 5);
        else if (strcmp(word, "blind") == 0) is_blind = 1;
        else read_fault(word);
    }
}

static int log_file(const char *path) {
    int found = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    int high = fcntl(found, F_DUPFD_CLOEXEC, 900); /* out of the way of what the driver counts on */
    syscall(SYS_close, found);
    return high;
}

__attribute__((constructor)) static void begin(void) {
    const char *folder = getenv("FAULT_ROOT"), *log = getenv("FAULT_LOG"), *plan = getenv("FAULT_DO");
    if (!folder) return;
    root_length = strlen(folder);
    memcpy(root, folder, root_length + 1);
    driver = getpid();
    if (log) {
        char data[PATH_MAX];
        snprintf(data, sizeof data, "%s.data", log);
        log_fd = log_file(log);
        data_fd = log_file(data);
    }
    if (plan) {
        char copy[1024];
        snprintf(copy, sizeof copy, "%s", plan);
        read_plan(copy);
    }
    unsetenv("FAULT_ROOT");
    unsetenv("LD_PRELOAD");
}

/* Where things are ---------------------------------------------------------------------- */

static int is_below_root(const char *path) {
    return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || path[root_length] == 0);
}

static int path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return 1;
}

static int resolve(int dirfd, const char *name, char *path) {
    char base[PATH_MAX] = "";
    if (!driver || getpid() != driver || !name) return 0;
    if (name[0] != '/') {
        if (dirfd == AT_FDCWD) { if (!getcwd(base, sizeof base)) return 0; }
        else if (!path_of(dirfd, base)) return 0;
        strcat(base, "/");
    }
    snprintf(path, PATH_MAX, "%s%s", base, name);
    return is_below_root(path);
}

static int resolve_fd(int fd, char *path) {
    return driver && getpid() == driver && path_of(fd, path) && is_below_root(path);
}

/* What becomes of a call ----------------------------------------------------------------- */

static void note(const char *kind, const char *path, const char *other, long offset, const void *bytes, size_t size) {
    char line[3 * PATH_MAX];
    if (log_fd < 0) return;
    if (size) {
        if (syscall(SYS_write, data_fd, bytes, size) != (long)size) abort();
        data_bytes += size;
    }
    int length = snprintf(line, sizeof line, "%s\t%s\t%s\t%ld\t%ld\t%zu\n", kind, path, other, offset,
                          data_bytes - (long)size, size);
    if (syscall(SYS_write, log_fd, line, length) != length) abort();
}

static int is_to_fail(enum kind kind) {
    long call = ++num_calls[kind];
    for (int i = 0; i < num_faults; i++)
        if (faults[i].kind == kind && (call == faults[i].first || (faults[i].is_lasting && call > faults[i].first))) {
            errno = faults[i].number;
            return 1;
        }
    return 0;
}

static void die(void) {
    kill(driver, SIGKILL);
    for (;;) pause();
}

/* Counts the operation and does what the plan says of it: 1 where it is to fail, errno being set. */
static int meet(enum kind kind) {
    pthread_mutex_lock(&mutex);
    num_operations++;
    if (num_operations == kill_at) die();
    if (num_operations == stop_at) kill(driver, SIGSTOP);
    int fails = is_to_fail(kind);
    pthread_mutex_unlock(&mutex);
    return fails;
}

/* Calls: each meets its fate, is done, and is noted if it has succeeded --------------------- */

#define DO(kind, is_ours, call, ...)                                       \
    if (!(is_ours)) return call;                                           \
    if (meet(kind)) return -1;                                             \
    __typeof__(call) result = call;                                        \
    int saved = errno;                                                     \
    if (result >= 0) note(NAMES[kind], __VA_ARGS__);                       \
    errno = saved;                                                         \
    return result

static int open_any(int dirfd, const char *name, int flags, mode_t mode) {
    char path[PATH_MAX];
    if (!resolve(dirfd, name, path)) return syscall(SYS_openat, dirfd, name, flags, mode);
    pthread_mutex_lock(&mutex);
    int fails = is_to_fail(OPEN);
    pthread_mutex_unlock(&mutex);
    if (fails) return -1;
    int is_new = (flags & O_CREAT) && syscall(SYS_faccessat, AT_FDCWD, path, F_OK) != 0;
    if (!is_new && !(flags & O_TRUNC)) return syscall(SYS_openat, dirfd, name, flags, mode);
    DO(is_new ? CREATE : TRUNCATE, 1, (int)syscall(SYS_openat, dirfd, name, flags, mode), path, "", 0, "", 0);
}

#define MODE(flags)                                                        \
    mode_t mode = 0;                                                       \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {                               \
        va_list rest;                                                      \
        va_start(rest, flags);                                             \
        mode = va_arg(rest, mode_t);                                       \
        va_end(rest);                                                      \
    }

int open(const char *name, int flags, ...) { MODE(flags) return open_any(AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE(flags) return open_any(AT_FDCWD, name, flags, mode); }
int openat(int dirfd, const char *name, int flags, ...) { MODE(flags) return open_any(dirfd, name, flags, mode); }
int openat64(int dirfd, const char *name, int flags, ...) { MODE(flags) return open_any(dirfd, name, flags, mode); }
int creat(const char *name, mode_t mode) { return open_any(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int __open_2(const char *name, int flags) { return open_any(AT_FDCWD, name, flags, 0); }
int __open64_2(const char *name, int flags) { return open_any(AT_FDCWD, name, flags, 0); }

static long offset_of(int fd) {
    int flags = fcntl(fd, F_GETFL);
    return lseek(fd, 0, flags & O_APPEND ? SEEK_END : SEEK_CUR);
}

static void say(int fd, const void *bytes, size_t size) {
    if (driver && getpid() == driver && (fd == 1 || fd == 2)) {
        pthread_mutex_lock(&mutex);
        note("say", "", "", 0, bytes, size);
        pthread_mutex_unlock(&mutex);
    }
}

ssize_t pwrite(int fd, const void *bytes, size_t size, off_t offset) {
    char path[PATH_MAX];
    int is_ours = resolve_fd(fd, path);
    if (is_ours && num_operations + 1 == tear_at) {
        syscall(SYS_pwrite64, fd, bytes, size / 2, offset);
        die();
    }
    DO(WRITE, is_ours, syscall(SYS_pwrite64, fd, bytes, size, offset), path, "", offset, bytes, size);
}
ssize_t pwrite64(int fd, const void *bytes, size_t size, off_t offset) { return pwrite(fd, bytes, size, offset); }

ssize_t write(int fd, const void *bytes, size_t size) {
    char path[PATH_MAX];
    if (!resolve_fd(fd, path)) {
        say(fd, bytes, size);
        return syscall(SYS_write, fd, bytes, size);
    }
    long offset = offset_of(fd);
    if (num_operations + 1 == tear_at) {
        syscall(SYS_write, fd, bytes, size / 2);
        die();
    }
    DO(WRITE, 1, syscall(SYS_write, fd, bytes, size), path, "", offset, bytes, size);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    char path[PATH_MAX];
    if (!resolve_fd(fd, path)) return REAL(writev)(fd, parts, count);
    ssize_t total = 0;
    for (int i = 0; i < count; i++) {
        ssize_t done = write(fd, parts[i].iov_base, parts[i].iov_len);
        if (done < 0) return total ? total : done;
        total += done;
    }
    return total;
}

int ftruncate(int fd, off_t size) {
    char path[PATH_MAX];
    DO(TRUNCATE, resolve_fd(fd, path), (int)syscall(SYS_ftruncate, fd, size), path, "", size, "", 0);
}
int ftruncate64(int fd, off_t size) { return ftruncate(fd, size); }

int fsync(int fd) {
    char path[PATH_MAX];
    DO(FSYNC, resolve_fd(fd, path), (int)syscall(SYS_fsync, fd), path, "", 0, "", 0);
}
int fdatasync(int fd) { return fsync(fd); }

int linkat(int from_fd, const char *from, int to_fd, const char *to, int flags) {
    char path[PATH_MAX], other[PATH_MAX];
    int is_ours = resolve(from_fd, from, path) | resolve(to_fd, to, other);
    DO(LINK, is_ours, (int)syscall(SYS_linkat, from_fd, from, to_fd, to, flags), path, other, 0, "", 0);
}
int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

static int rename_any(enum kind kind, int from_fd, const char *from, int to_fd, const char *to, unsigned flags) {
    char path[PATH_MAX], other[PATH_MAX];
    int is_ours = resolve(from_fd, from, path) | resolve(to_fd, to, other);
    DO(kind, is_ours, (int)syscall(SYS_renameat2, from_fd, from, to_fd, to, flags), path, other, 0, "", 0);
}
int rename(const char *from, const char *to) { return rename_any(RENAME, AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int from_fd, const char *from, int to_fd, const char *to) {
    return rename_any(RENAME, from_fd, from, to_fd, to, 0);
}
int renameat2(int from_fd, const char *from, int to_fd, const char *to, unsigned flags) {
    return rename_any(RENAMEAT2, from_fd, from, to_fd, to, flags);
}

int unlinkat(int dirfd, const char *name, int flags) {
    char path[PATH_MAX];
    DO(UNLINK, resolve(dirfd, name, path), (int)syscall(SYS_unlinkat, dirfd, name, flags), path, "", 0, "", 0);
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int remove(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }

int mkdirat(int dirfd, const char *name, mode_t mode) {
    char path[PATH_MAX];
    DO(MKDIR, resolve(dirfd, name, path), (int)syscall(SYS_mkdirat, dirfd, name, mode), path, "", 0, "", 0);
}
int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

int statvfs64(const char *name, struct statvfs64 *found) {
    char path[PATH_MAX];
    int result = REAL(statvfs64)(name, found);
    if (is_blind && resolve(AT_FDCWD, name, path)) memset(found, 0, sizeof *found);
    return result;
}
int statvfs(const char *name, struct statvfs *found) { return statvfs64(name, (struct statvfs64 *)found); }
