/* What attention.c and its kernels share. */

#ifndef AIOS_ATTENTION_H
#define AIOS_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

/* How many cells are converted to floats at a time, and how many rows read them together: with heads of 64 values
 * both, the rows, the scores and the sums stay in the caches next to the core. */
enum { CELLS = 32, ROWS = 64 };

/* -inf, as f16: what a mask adds to the score of a cell that a row must not see. */
enum { HIDDEN = 0xFC00 };

/* Shared state outside of the cache, a run of consecutive tokens: each part has a row per token, and the parts lie
 * one after the other (K of layer 0, …, K of the last, V of layer 0, …). */
typedef struct {
    const char *data;
    int64_t cells;
} run;

/* Rows that a thread works on together: all of one KV head. */
typedef struct {
    int head_dim, value_dim;
    int rows, padded; /* padded: up to a multiple of the vector's width; rows beyond are empty */
    float *queries;   /* [head_dim][padded], scaled */
    float *keys;      /* [CELLS][head_dim] */
    float *values;    /* [CELLS][value_dim] */
    float *scores;    /* [CELLS][padded] */
    float *max, *sum; /* [padded] */
    float *out;       /* [padded][value_dim], not yet divided by sum */
} work;

/* Cells of one KV head: the address of the first, and the distance to the next. */
typedef struct {
    const char *keys, *values;
    size_t key_stride, value_stride;
} cells;

/* What one instruction set offers. */
typedef struct {
    int width; /* floats in a vector */
    /* `count` cells for the columns [first, last) of all rows. `masks`: per column a row of f16 to be added from the
     * first of these cells on; NULL: every row sees every cell, as it does the first `open` ones. */
    void (*wide)(const work *w, const cells *c, int count, int first, int last, const uint16_t *const *masks,
                 int open);
    /* The same for a few rows, each a vector of `head_dim` scaled floats. */
    void (*narrow)(const work *w, const cells *c, int count, int first, int last, const float *queries,
                   const uint16_t *const *masks);
    /* out[row] / sum[row] → target */
    void (*finish)(const work *w, int row, float *target);
    /* The range of the `count` f16 that are not -inf: returns its end, *from is its start; *plain: all values in it
     * are 0. */
    int (*visible)(const uint16_t *mask, int count, int *from, int *plain);
} kernel;

extern const kernel kernel_avx2, kernel_avx512;

#endif
