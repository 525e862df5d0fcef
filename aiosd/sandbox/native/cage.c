/* Builds the cage once, when the system starts, and enters it in every agent that is confined to it.
 *
 * There are two namespaces of mounts, which belong to one namespace of users:
 *
 *     machine    all mounts of the machine, as they are (later mounts appear there, too)
 *     cage       a new root in memory, read-only: programs and libraries, /etc, /proc, devices; the rest is empty
 *
 * A process enters `machine`, takes copies of the mounts that it is given (its workspace, files that were granted),
 * goes on to `cage`, makes namespaces of users and mounts of its own there, and attaches the copies at their places. So
 * no process holds capabilities to do this for others, and a process copies the few mounts of the cage, not the
 * hundreds that a machine may have.
 *
 * A process that may reach single hosts also gets a network namespace of its own, which has no way out. Sockets that
 * listen on its loopback are passed to processes outside before its program runs (see `aiosd/net`).
 *
 * No path is followed through a symbolic link, neither of a source nor of a target. */

#define _GNU_SOURCE
#include "cage.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MOST_PLACES 1024
#define SYS_OPEN_TREE 428 /* the same on all processors */
#define SYS_MOVE_MOUNT 429
#define SYS_FSOPEN 430
#define SYS_FSCONFIG 431
#define SYS_FSMOUNT 432
#define SYS_OPENAT2 437
#define SYS_MOUNT_SETATTR 442
/* <sys/mount.h> and <linux/mount.h> exclude each other in older C libraries. */
#define SLAVE (1ul << 19)
#define PRIVATE (1ul << 18)
#define RECURSIVE (1ul << 14)
#define DETACH 2
#define STAGE "usr" /* a folder that every machine has; the new root is mounted over it while it is built */

typedef struct {
    const place *it;
    const char *source, *target;
} record;

static int next_record(const char **at, const char *end, record *found) {
    const place *it = (const place *)*at;
    const char *texts = *at + sizeof *it;

    if (texts > end || it->length > (uint64_t)(end - texts) || !it->length || it->target_at >= it->length ||
        !it->target_at || texts[it->target_at - 1] || texts[it->length - 1])
        return errno = EINVAL, -PLAN;
    *found = (record){it, texts, texts + it->target_at};
    *at = texts + it->length;
    return 0;
}

static int open_beneath(int root, const char *path, uint64_t flags) {
    struct open_how how = {.flags = flags | O_CLOEXEC, .resolve = RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS};
    return (int)syscall(SYS_OPENAT2, root, *path ? path : ".", &how, sizeof how);
}

/* A copy of the mounts below a path, attached nowhere. The record's attributes are added to those of the mounts. */
static int copy_of(int root, const record *one) {
    struct mount_attr attributes = {.attr_set = one->it->attributes};
    int found = open_beneath(root, one->source, O_PATH);
    if (found < 0)
        return -1;
    int copy = (int)syscall(SYS_OPEN_TREE, found, "", AT_EMPTY_PATH | AT_RECURSIVE | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    int reason = errno;
    close(found);
    if (copy >= 0 &&
        syscall(SYS_MOUNT_SETATTR, copy, "", AT_EMPTY_PATH | AT_RECURSIVE, &attributes, sizeof attributes)) {
        reason = errno;
        close(copy);
        copy = -1;
    }
    errno = reason;
    return copy;
}

static int copy_all(int *copies, uint32_t count, const char *at, const char *end) {
    record one;
    int root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (root < 0)
        return -SOURCE;
    for (uint32_t i = 0; i < count; i++) {
        if (next_record(&at, end, &one))
            return -PLAN;
        copies[i] = one.it->kind == ATTACH ? copy_of(root, &one) : -1;
        if (copies[i] < 0 && one.it->kind == ATTACH && one.it->must)
            return -SOURCE;
    }
    close(root);
    return 0;
}

/* Makes the missing folders above a path. An error shows when the path itself is made. */
static void make_parents(int root, const char *path) {
    char part[4096];
    for (const char *slash = strchr(path, '/'); slash; slash = strchr(slash + 1, '/')) {
        if ((size_t)(slash - path) >= sizeof part)
            return;
        memcpy(part, path, (size_t)(slash - path));
        part[slash - path] = 0;
        mkdirat(root, part, 0755);
    }
}

/* Opens a path, which is made if it does not exist: an empty folder or an empty file. */
static int target_of(int root, const char *path, int folder) {
    int found = open_beneath(root, path, O_PATH);
    if (found >= 0 || errno != ENOENT)
        return found;
    make_parents(root, path);
    if (folder ? mkdirat(root, path, 0755) : mknodat(root, path, S_IFREG | 0444, 0))
        return -1;
    return open_beneath(root, path, O_PATH);
}

/* `options`: as of mount(8), such as "size=64m,mode=1777". Returns a mount that is attached nowhere. */
static int new_file_system(const char *type, const char *options, uint32_t attributes) {
    char text[256], *rest = text, *word;
    int made = -1, context = (int)syscall(SYS_FSOPEN, type, FSOPEN_CLOEXEC);

    if (context < 0)
        return -1;
    if (strlen(options) >= sizeof text)
        return close(context), errno = EINVAL, -1;
    strcpy(text, options);
    while ((word = strsep(&rest, ","))) {
        char *value = strchr(word, '=');
        if (!value)
            continue;
        *value++ = 0;
        if (syscall(SYS_FSCONFIG, context, FSCONFIG_SET_STRING, word, value, 0))
            goto out;
    }
    if (!syscall(SYS_FSCONFIG, context, FSCONFIG_CMD_CREATE, NULL, NULL, 0))
        made = (int)syscall(SYS_FSMOUNT, context, FSMOUNT_CLOEXEC, attributes);
out:;
    int reason = errno;
    close(context);
    errno = reason;
    return made;
}

static int attach(int root, int mounts, const char *target) {
    struct stat found;
    if (mounts < 0 || fstat(mounts, &found))
        return -1;
    int at = target_of(root, target, S_ISDIR(found.st_mode));
    int failed = at < 0 || syscall(SYS_MOVE_MOUNT, mounts, "", at, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
    int reason = errno;
    close(at);
    close(mounts);
    errno = reason;
    return failed ? -1 : 0;
}

static int seal(int root, const char *path) {
    struct mount_attr read_only = {.attr_set = MOUNT_ATTR_RDONLY};
    int at = open_beneath(root, path, O_PATH);
    int failed = at < 0 || syscall(SYS_MOUNT_SETATTR, at, "", AT_EMPTY_PATH, &read_only, sizeof read_only);
    int reason = errno;
    close(at);
    errno = reason;
    return failed ? -1 : 0;
}

static int put(int root, const record *one, int copy) {
    switch (one->it->kind) {
    case ATTACH:
        return copy < 0 ? 0 : attach(root, copy, one->target);
    case MEMORY:
        return attach(root, new_file_system("tmpfs", one->source, one->it->attributes), one->target);
    case TERMINALS:
        return attach(root, new_file_system("devpts", one->source, one->it->attributes), one->target);
    case FOLDER:
        make_parents(root, one->target);
        return mkdirat(root, one->target, 0755) && errno != EEXIST ? -1 : 0;
    case LINK:
        return symlinkat(one->source, root, one->target);
    case SEAL:
        return seal(root, one->target);
    }
    return errno = EINVAL, -1;
}

static int put_all(int root, const int *copies, uint32_t count, const char *at, const char *end, const char **next) {
    record one;
    mode_t mask = umask(022);
    int failed = 0;
    for (uint32_t i = 0; i < count && !failed; i++) {
        failed = next_record(&at, end, &one);
        if (!failed && put(root, &one, copies[i]))
            failed = -PLACE;
    }
    umask(mask);
    *next = at;
    return failed;
}

static int write_text(int folder, const char *name, const char *text) {
    int fd = openat(folder, name, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    int failed = write(fd, text, strlen(text)) < 0;
    int reason = errno;
    close(fd);
    errno = reason;
    return failed ? -1 : 0;
}

/* Makes new namespaces. In that of users only this user and group are mapped, each to its own number. `self`:
 * /proc/self, opened outside of the cage, because /proc is read-only in it. */
static int unshare_as_same_user(int self, int namespaces) {
    char line[64];
    uid_t user = geteuid(); /* read before unshare, after which both are unmapped */
    gid_t group = getegid();

    if (unshare(CLONE_NEWUSER | namespaces))
        return -NAMESPACES;
    if (write_text(self, "setgroups", "deny"))
        return -MAPPING;
    snprintf(line, sizeof line, "%u %u 1", user, user);
    if (write_text(self, "uid_map", line))
        return -MAPPING;
    snprintf(line, sizeof line, "%u %u 1", group, group);
    return write_text(self, "gid_map", line) ? -MAPPING : 0;
}

/* The loopback interface of a new network namespace is down. */
static int raise_loopback(void) {
    struct ifreq request = {.ifr_name = "lo"};
    int sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (sock < 0)
        return -NETWORK;
    int failed = ioctl(sock, SIOCGIFFLAGS, &request);
    request.ifr_flags |= IFF_UP;
    failed = failed || ioctl(sock, SIOCSIFFLAGS, &request);
    int reason = errno;
    close(sock);
    errno = reason;
    return failed ? -NETWORK : 0;
}

int cage_enter(const cage_entry *cage, const char *at, const char *end, const char **next) {
    int copies[MOST_PLACES];

    if (cage->places > MOST_PLACES)
        return errno = E2BIG, -PLAN;
    int self = open("/proc/self", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (self < 0 || setns(cage->user, CLONE_NEWUSER) || setns(cage->machine, CLONE_NEWNS))
        return -NAMESPACES;
    int failed = copy_all(copies, cage->places, at, end);
    if (failed)
        return failed;
    if (setns(cage->cage, CLONE_NEWNS) || setns(cage->ipc, CLONE_NEWIPC) ||
        (cage->net >= 0 && setns(cage->net, CLONE_NEWNET)))
        return -NAMESPACES;
    int own_network = cage->net == OWN_NETWORK;
    failed = unshare_as_same_user(self, CLONE_NEWNS | (own_network ? CLONE_NEWNET : 0));
    if (!failed && own_network)
        failed = raise_loopback();
    if (failed)
        return failed;
    int root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (root < 0)
        return -ROOT;
    failed = put_all(root, copies, cage->places, at, end, next);
    int reason = errno;
    close(root);
    close(self);
    errno = reason;
    return failed;
}

static int build_root(const int *copies, uint32_t count, const char *at, const char *end) {
    if (unshare(CLONE_NEWNS) || syscall(SYS_mount, NULL, "/", NULL, PRIVATE | RECURSIVE, NULL))
        return -NAMESPACES;
    int old = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (old < 0 || attach(old, new_file_system("tmpfs", "size=1m,mode=755", MOUNT_ATTR_NOSUID), STAGE))
        return -ROOT;
    int root = open_beneath(old, STAGE, O_PATH | O_DIRECTORY);
    close(old);
    if (root < 0)
        return -ROOT;
    int failed = put_all(root, copies, count, at, end, &at);
    if (failed)
        return failed;
    if (fchdir(root) || syscall(SYS_pivot_root, ".", ".") || syscall(SYS_umount2, ".", DETACH) || chdir("/") ||
        seal(AT_FDCWD, ""))
        return -ROOT;
    return close(root);
}

/* Builds the cage of `count` places, and stores descriptors of its namespaces in `made` (user, machine, cage, ipc,
 * net). Returns 0, or -step with errno set. Call it in a process forked for this, which must end afterwards. */
int aios_build_cage(const char *places, uint64_t size, uint32_t count, int32_t made[5]) {
    int copies[MOST_PLACES];
    const char *end = places + size;

    if (count > MOST_PLACES)
        return errno = E2BIG, -PLAN;
    int self = open("/proc/self", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (self < 0)
        return -NAMESPACES;
    int failed = unshare_as_same_user(self, CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWNET);
    if (failed)
        return failed;
    if (syscall(SYS_mount, NULL, "/", NULL, SLAVE | RECURSIVE, NULL))
        return -NAMESPACES;
    made[0] = openat(self, "ns/user", O_RDONLY | O_CLOEXEC);
    made[1] = openat(self, "ns/mnt", O_RDONLY | O_CLOEXEC);
    made[3] = openat(self, "ns/ipc", O_RDONLY | O_CLOEXEC);
    made[4] = openat(self, "ns/net", O_RDONLY | O_CLOEXEC);
    failed = copy_all(copies, count, places, end);
    if (!failed)
        failed = build_root(copies, count, places, end);
    if (failed)
        return failed;
    made[2] = openat(self, "ns/mnt", O_RDONLY | O_CLOEXEC);
    for (int i = 0; i < 5; i++)
        if (made[i] < 0)
            return -NAMESPACES;
    return 0;
}
