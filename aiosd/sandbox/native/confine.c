/* Confines the calling process by a plan, which plan.py makes. One call does all of it, because it runs in every new
 * agent: the same steps through ctypes would cost each agent 400 kB of memory and a millisecond.
 *
 * The order matters. The cage comes first, because it needs capabilities, which are dropped next. no_new_privs comes
 * before Landlock and seccomp, which demand it. Landlock comes after the mounts, because its rules are about files in
 * them. seccomp is last, because it forbids system calls that the other steps need.
 *
 * A plan is: a `head`, `filter_len` instructions of the seccomp program, `cage.places` records of `place`, then `rules`
 * records of `rule`. Each record is followed by its paths.
 * When a step fails no further one is taken: the caller gets the number of that step, and ends the process.
 */

#define _GNU_SOURCE
#include "cage.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <stdint.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SYS_CREATE_RULESET 444 /* the same on all processors */
#define SYS_ADD_RULE 445
#define SYS_RESTRICT_SELF 446
#define SYS_OPENAT2 437
#define RULE_PATH_BENEATH 1
#define NO_SYMLINKS 4 /* RESOLVE_NO_SYMLINKS */
#define SET_MODE_FILTER 1
#define NEW_LISTENER 8
#define ALL_SECUREBITS 0x2f /* NOROOT and NO_SETUID_FIXUP set, KEEP_CAPS not; all three locked */
#define LAST_CAPABILITY 63

/* The rights that a rule may grant on a file that is no folder: execute, write, read, truncate, ioctl of a device. */
#define ON_FILES ((1u << 0) | (1u << 1) | (1u << 2) | (1u << 14) | (1u << 15))

typedef struct {
    uint32_t rules, filter_len;
    uint32_t ruleset_size; /* bytes of `ruleset` that this kernel knows */
    uint32_t drop;         /* 1: drop all capabilities */
    uint32_t listen;       /* 1: the filter notifies a listener, whose descriptor is returned */
    uint32_t reserved;
    struct {
        uint64_t files, net, scoped;
    } ruleset;
    cage_entry cage;
} head;

typedef struct {
    uint64_t rights;
    uint32_t must;   /* 1: a path that cannot be opened is an error; 0: it grants nothing */
    uint32_t strict; /* 1: a path through a symbolic link cannot be opened */
    uint32_t length; /* of the path that follows, with its NUL and padding; a multiple of 8 */
    int32_t opened;  /* a descriptor to use (and close) instead of the path, with rights that fit its type; -1: none */
} rule;

static int drop_capabilities(void) {
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct none[2] = {{0}};

    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    if (prctl(PR_CAPBSET_READ, 0, 0, 0, 0) >= 0)
        for (int capability = 0; capability <= LAST_CAPABILITY; capability++)
            if (prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) && errno == EINVAL)
                break; /* beyond the last of this Linux; EPERM (no CAP_SETPCAP) does no harm: no_new_privs follows */
    prctl(PR_SET_SECUREBITS, ALL_SECUREBITS, 0, 0, 0);
    return syscall(SYS_capset, &header, none) ? -1 : 0;
}

static int open_path(const rule *one, const char *path) {
    if (one->strict) {
        struct {
            uint64_t flags, mode, resolve;
        } how = {O_PATH | O_CLOEXEC, 0, NO_SYMLINKS};
        return (int)syscall(SYS_OPENAT2, AT_FDCWD, path, &how, sizeof how);
    }
    return open(path, O_PATH | O_CLOEXEC);
}

static int add_rule(int ruleset, const rule *one, const char *path) {
    struct {
        uint64_t rights;
        int32_t fd;
    } __attribute__((packed)) beneath = {one->rights, -1};
    struct stat found;
    int failed;

    beneath.fd = one->opened >= 0 ? one->opened : open_path(one, path);
    if (beneath.fd < 0)
        return one->must ? -PATH : 0;
    if (one->opened < 0 && fstat(beneath.fd, &found) == 0 && !S_ISDIR(found.st_mode))
        beneath.rights &= ON_FILES;
    failed = beneath.rights && syscall(SYS_ADD_RULE, ruleset, RULE_PATH_BENEATH, &beneath, 0);
    int reason = errno;
    close(beneath.fd);
    errno = reason;
    return failed ? -RULE : 0;
}

static int add_rules(int ruleset, const char *at, const char *end, uint32_t count) {
    while (count--) {
        const rule *one = (const rule *)at;
        at += sizeof *one;
        if (at > end || one->length > (uint64_t)(end - at) || !one->length || at[one->length - 1])
            return errno = EINVAL, -PLAN;
        int failed = add_rule(ruleset, one, at);
        if (failed)
            return failed;
        at += one->length;
    }
    return 0;
}

/* Returns 0, or the descriptor of the filter's listener, or -step with errno set. In the last case the earlier steps
 * have confined the process in part, and it must end. */
int aios_confine(const void *plan, uint64_t size) {
    const head *all = plan;
    const char *end = (const char *)plan + size;
    uint64_t filter_bytes = (uint64_t)all->filter_len * sizeof(struct sock_filter);

    if (size < sizeof *all || filter_bytes > size - sizeof *all || all->filter_len > BPF_MAXINSNS)
        return errno = EINVAL, -PLAN;
    const char *filter = (const char *)(all + 1), *at = filter + filter_bytes;
    int failed = all->cage.places ? cage_enter(&all->cage, at, end, &at) : 0;
    if (failed)
        return failed;
    if (all->drop && drop_capabilities())
        return -CAPABILITIES;
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        return -NO_NEW_PRIVS;

    int ruleset = (int)syscall(SYS_CREATE_RULESET, &all->ruleset, all->ruleset_size, 0);
    if (ruleset < 0)
        return -RULESET;
    failed = add_rules(ruleset, at, end, all->rules);
    if (!failed && syscall(SYS_RESTRICT_SELF, ruleset, 0))
        failed = -RESTRICT;
    int reason = errno;
    close(ruleset);
    errno = reason;
    if (failed)
        return failed;

    struct sock_fprog program = {(unsigned short)all->filter_len, (struct sock_filter *)filter};
    int listener = (int)syscall(SYS_seccomp, SET_MODE_FILTER, all->listen ? NEW_LISTENER : 0, &program);
    return listener < 0 ? -FILTER : listener;
}
