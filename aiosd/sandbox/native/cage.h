/* The cage: namespaces in which a process sees only those parts of the machine that it was given. */

#ifndef AIOS_CAGE_H
#define AIOS_CAGE_H

#include <stdint.h>

/* Steps that can fail. A function returns the number of the failed step, negative, with errno set. confine.py has a
 * text for each, in this order. */
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

/* Values of cage_entry.net that are no descriptors. */
#define KEEP_NETWORK -1
#define OWN_NETWORK -2 /* a new one, in which there is only a loopback */

/* Descriptors of namespaces: users, the mounts of the machine, the mounts of the cage, IPC, network. */
typedef struct {
    int32_t user, machine, cage, ipc, net;
    uint32_t places; /* how many records of `place` follow; 0: there is no cage to enter */
} cage_entry;

enum kind { ATTACH, MEMORY, TERMINALS, FOLDER, LINK, SEAL };

/* One place in the cage. After the record come source and target, as paths without the slash at their beginning, each
 * with a NUL, together `length` bytes (a multiple of 8). places.py packs them. */
typedef struct {
    uint32_t kind;
    uint32_t attributes; /* of a mount: flags MOUNT_ATTR_* */
    uint32_t must;       /* 1: a source that does not exist is an error */
    uint32_t target_at;  /* offset of the target from the end of the record */
    uint32_t length;
    uint32_t reserved;
} place;

/* Enters the cage with the records of places from `at` on. A record that reaches beyond `end` is an error. The end of
 * the last one is stored in `*next`. Returns 0 or -step. */
int cage_enter(const cage_entry *cage, const char *at, const char *end, const char **next);

#endif
