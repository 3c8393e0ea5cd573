/* A library for LD_PRELOAD that makes the disk of one process slow, stuck or full, and its wall clock wrong.

   FAULT_SHIM_FILE names a file with four native 64-bit integers, which may be changed while the process runs:
     0  microseconds that each read, write, flush, rename or removal takes longer
     1  nonzero: writes, flushes, renames and removals wait until the value is zero again
     2  bytes that are free on the disk, or a negative number for no limit. Growing files decrease it, removed and
        shortened files increase it.
     3  microseconds that are added to the wall clock
   The file may be longer. The faults of the disk concern regular files whose path begins with FAULT_SHIM_ROOT. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { DELAY_US, STUCK, FREE_BYTES, CLOCK_US, VALUES };

static _Atomic int64_t none[VALUES] = {0, 0, -1, 0};
static _Atomic int64_t *values = none;
static const char *root;

/* The C library's function. It is looked up once. */
#define REAL(name) \
    (__extension__({ \
        static __typeof__(&name) found; \
        if (!found) found = (__typeof__(&name))dlsym(RTLD_NEXT, #name); \
        found; \
    }))

__attribute__((constructor)) static void map_control_file(void) {
    const char *path = getenv("FAULT_SHIM_FILE");
    root = getenv("FAULT_SHIM_ROOT");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *mapped = mmap(NULL, sizeof none, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapped != MAP_FAILED) values = mapped;
    close(fd);
}

static int path_concerned(const char *path) {
    return values != none && root && path && strncmp(path, root, strlen(root)) == 0;
}

static int concerned(int fd) {
    struct stat about;
    char link[32], path[PATH_MAX];
    if (values == none || fstat(fd, &about) || !(S_ISREG(about.st_mode) || S_ISDIR(about.st_mode))) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return path_concerned(path);
}

static void pause_us(int64_t us) {
    struct timespec time = {us / 1000000, us % 1000000 * 1000};
    while (nanosleep(&time, &time) && errno == EINTR) continue;
}

static void wait_for_disk(int writes) {
    int saved = errno;
    if (values[DELAY_US] > 0) pause_us(values[DELAY_US]);
    while (writes && values[STUCK]) pause_us(5000);
    errno = saved;
}

/* Takes bytes from the free space. Returns 0, or -1 with errno ENOSPC. */
static int take(int64_t bytes) {
    int64_t before = values[FREE_BYTES];
    while (before >= 0 && bytes > 0) {
        if (bytes > before) { errno = ENOSPC; return -1; }
        if (atomic_compare_exchange_weak(&values[FREE_BYTES], &before, before - bytes)) return 0;
    }
    return 0;
}

static void give_back(int64_t bytes) {
    int64_t before = values[FREE_BYTES];
    while (before >= 0 && !atomic_compare_exchange_weak(&values[FREE_BYTES], &before, before + bytes)) continue;
}

/* Takes the space by which a write of `count` bytes at `offset` grows the file. */
static int grow(int fd, off_t offset, size_t count) {
    struct stat about;
    if (fstat(fd, &about)) return 0;
    return take((int64_t)offset + (int64_t)count - (int64_t)about.st_size);
}

static int before_write(int fd, off_t offset, size_t count) {
    if (!concerned(fd)) return 0;
    wait_for_disk(1);
    return grow(fd, offset, count);
}

ssize_t write(int fd, const void *data, size_t count) {
    if (concerned(fd)) {
        struct stat about;
        int appends = (fcntl(fd, F_GETFL) & O_APPEND) && !fstat(fd, &about);
        wait_for_disk(1);
        if (grow(fd, appends ? about.st_size : lseek(fd, 0, SEEK_CUR), count)) return -1;
    }
    return REAL(write)(fd, data, count);
}

ssize_t pwrite(int fd, const void *data, size_t count, off_t offset) {
    return before_write(fd, offset, count) ? -1 : REAL(pwrite)(fd, data, count, offset);
}

ssize_t pwrite64(int fd, const void *data, size_t count, off64_t offset) {
    return before_write(fd, offset, count) ? -1 : REAL(pwrite64)(fd, data, count, offset);
}

ssize_t read(int fd, void *into, size_t count) {
    if (values[DELAY_US] > 0 && concerned(fd)) wait_for_disk(0);
    return REAL(read)(fd, into, count);
}

ssize_t pread(int fd, void *into, size_t count, off_t offset) {
    if (values[DELAY_US] > 0 && concerned(fd)) wait_for_disk(0);
    return REAL(pread)(fd, into, count, offset);
}

ssize_t pread64(int fd, void *into, size_t count, off64_t offset) {
    if (values[DELAY_US] > 0 && concerned(fd)) wait_for_disk(0);
    return REAL(pread64)(fd, into, count, offset);
}

int fsync(int fd) {
    if (concerned(fd)) wait_for_disk(1);
    return REAL(fsync)(fd);
}

int fdatasync(int fd) {
    if (concerned(fd)) wait_for_disk(1);
    return REAL(fdatasync)(fd);
}

int posix_fallocate(int fd, off_t offset, off_t length) {
    return before_write(fd, offset, (size_t)length) ? ENOSPC : REAL(posix_fallocate)(fd, offset, length);
}

int posix_fallocate64(int fd, off64_t offset, off64_t length) {
    return before_write(fd, offset, (size_t)length) ? ENOSPC : REAL(posix_fallocate64)(fd, offset, length);
}

static int resize(int fd, off64_t length, int (*call)(int, off64_t)) {
    struct stat about;
    int counts = concerned(fd) && !fstat(fd, &about);
    if (counts) {
        wait_for_disk(1);
        if (take((int64_t)length - (int64_t)about.st_size)) return -1;
    }
    int result = call(fd, length);
    if (counts && result == 0 && about.st_size > length) give_back((int64_t)about.st_size - (int64_t)length);
    return result;
}

int ftruncate(int fd, off_t length) { return resize(fd, length, REAL(ftruncate64)); }

int ftruncate64(int fd, off64_t length) { return resize(fd, length, REAL(ftruncate64)); }

int unlink(const char *path) {
    struct stat about;
    int counts = path_concerned(path) && !stat(path, &about);
    if (counts) wait_for_disk(1);
    int result = REAL(unlink)(path);
    if (counts && result == 0 && about.st_nlink == 1) give_back((int64_t)about.st_size);
    return result;
}

int rename(const char *from, const char *to) {
    if (path_concerned(to)) wait_for_disk(1);
    return REAL(rename)(from, to);
}

static void shift(struct timespec *time) {
    int64_t ns = time->tv_nsec + values[CLOCK_US] % 1000000 * 1000;
    time->tv_sec += values[CLOCK_US] / 1000000 + (ns >= 1000000000) - (ns < 0);
    time->tv_nsec = ns >= 1000000000 ? ns - 1000000000 : ns < 0 ? ns + 1000000000 : ns;
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    int result = REAL(clock_gettime)(clock, time);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) shift(time);
    return result;
}

int gettimeofday(struct timeval *restrict time, void *restrict zone) {
    struct timespec now;
    (void)zone;
    int result = clock_gettime(CLOCK_REALTIME, &now);
    time->tv_sec = now.tv_sec;
    time->tv_usec = now.tv_nsec / 1000;
    return result;
}

time_t time(time_t *into) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (into) *into = now.tv_sec;
    return now.tv_sec;
}
