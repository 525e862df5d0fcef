/* The cage: namespaces in which a process sees of the machine what it was given, and nothing else. */

#ifndef AIOS_CAGE_H
#define AIOS_CAGE_H

#include <stdint.h>

/* Steps that can fail; the function that failed returns the negative number, with errno set. */
enum step {
    OK,
    PLAN,
    CAPABILITIES,
    NO_NEW_PRIVS,
    RULESET,
    PATH,
    RULE,
    RESTRICT,
    FILTER,
    NAMESPACES,
    MAPPING,
    SOURCE,
    PLACE,
    ROOT,
    NETWORK,
};

/* In place of the descriptor of a network. */
#define KEEP_NETWORK -1
#define OWN_NETWORK -2 /* a new one, in which there is nothing but its own loopback */

/* Descriptors of namespaces: that of users, all mounts of the machine, those of the cage, IPC, network. */
typedef struct {
    int32_t user, machine, cage, ipc, net;
    uint32_t places; /* records of `place`; 0: there is no cage to enter */
} cage_entry;

enum kind { ATTACH, MEMORY, TERMINALS, FOLDER, LINK, SEAL };

/* One place in the cage; behind the record are source and target, without a slash at their beginning, each with a NUL,
 * together `length` bytes (a multiple of 8). */
typedef struct {
    uint32_t kind;
    uint32_t attributes; /* MOUNT_ATTR_… of a mount */
    uint32_t must;       /* it is an error when the source is not there */
    uint32_t target_at;  /* where the target begins behind the record */
    uint32_t length;
    uint32_t reserved;
} place;

/* Enter the cage with the places from `at` on, of which none ends behind `end`. Where the last one ended is stored in
 * `*next`. Returns 0 or -step. */
int cage_enter(const cage_entry *cage, const char *at, const char *end, const char **next);

#endif
