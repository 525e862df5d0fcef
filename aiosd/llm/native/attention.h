/* Declarations shared by attention.c and its kernels (kernel.h). */

#ifndef AIOS_ATTENTION_H
#define AIOS_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

/* CELLS: how many cells are converted to floats at a time. ROWS: how many rows (queries) read them together, at most.
 * With heads of 64 values, the cells, the queries, the scores and the outputs then stay in the core's own caches. */
enum { CELLS = 32, ROWS = 64 };

/* -inf as f16: the mask value of a cell that a row must not see. */
enum { HIDDEN = 0xFC00 };

/* K and V of consecutive tokens, kept outside of the cache because sequences share them. The parts lie one after the
 * other: K of layer 0, K of layer 1, and so on, then V of layer 0, and so on. A part has one row for each token. */
typedef struct {
    const char *data;
    int64_t cells; /* tokens */
} run;

/* Rows (queries) that a thread computes together: all read the same KV head. */
typedef struct {
    int head_dim, value_dim;
    int rows, padded; /* padded: rounded up to a multiple of the vector's width */
    float *queries;   /* [head_dim][padded], scaled */
    float *keys;      /* [CELLS][head_dim] */
    float *values;    /* [CELLS][value_dim] */
    float *scores;    /* [CELLS][padded]; for `narrow` [row][ROWS] */
    float *max, *sum; /* [padded] */
    float *out;       /* [padded][value_dim], not yet divided by sum */
} work;

/* Cells of one KV head: the address of the first, and the distance from one to the next, in bytes. */
typedef struct {
    const char *keys, *values;
    size_t key_stride, value_stride;
} cells;

/* The inner loops, for one instruction set. */
typedef struct {
    int width; /* floats in a vector */
    /* Add `count` cells to the max, sum and out of the rows [first, last). `masks`: for each row, the f16 to add to the
     * scores of these cells. The first `open` cells need no mask; NULL: no cell does. */
    void (*wide)(const work *w, const cells *c, int count, int first, int last, const uint16_t *const *masks,
                 int open);
    /* The same for few rows. `queries`: [row][head_dim], scaled, from row `first` on. */
    void (*narrow)(const work *w, const cells *c, int count, int first, int last, const float *queries,
                   const uint16_t *const *masks);
    /* Write out[row] / sum[row] to `target`. */
    void (*finish)(const work *w, int row, float *target);
    /* The range of a mask of `count` f16 from the first to the last that is not -inf: *from is its start, the result
     * its end. *plain: are all values in it 0? */
    int (*visible)(const uint16_t *mask, int count, int *from, int *plain);
} kernel;

extern const kernel kernel_avx2, kernel_avx512;

#endif
