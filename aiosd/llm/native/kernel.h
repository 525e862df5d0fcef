/* The inner loops. attention.c includes this file once for each instruction set, with these macros:
 *
 *   TARGET      the attribute that lets the compiler use the instructions
 *   NAME(x)     x with a suffix for the instruction set, so that names differ
 *   VEC, WIDTH  the type of a vector, and how many floats it has
 *   V_*         operations on vectors
 *   TILE_CELLS  how many cells `scores` computes at once in registers, each for two vectors of rows
 *   TILE_ROWS   how many rows `collect` computes at once in registers, each with four vectors of values
 */

TARGET static inline VEC NAME(exponential)(VEC x)
{
    /* e^x = 2^n · e^r with |r| ≤ ln 2 / 2; a polynomial of degree 7 gives e^r to 2 units in the last place. For x ≤ -87
     * (e^x nears the smallest normal float) the result is 0; for NaN it is NaN, because V_MAX then returns its second
     * operand. */
    const VEC magic = V_SET(12582912.0f), asked = x;
    x = V_MAX(V_SET(-87.0f), x);
    VEC n = V_FMA(x, V_SET(1.44269504f), magic);
    VEC whole = V_SUB(n, magic);
    VEC r = V_FMA(whole, V_SET(-0.693359375f), x);
    r = V_FMA(whole, V_SET(2.12194440e-4f), r);
    VEC p = V_SET(1.9875691500e-4f);
    p = V_FMA(p, r, V_SET(1.3981999507e-3f));
    p = V_FMA(p, r, V_SET(8.3334519073e-3f));
    p = V_FMA(p, r, V_SET(4.1665795894e-2f));
    p = V_FMA(p, r, V_SET(1.6666665459e-1f));
    p = V_FMA(p, r, V_SET(5.0000001201e-1f));
    p = V_FMA(V_MUL(p, r), r, V_ADD(r, V_SET(1.0f)));
    return V_ABOVE(V_SCALE2(p, n), asked, -87.0f); /* the low bits of n hold the exponent */
}

TARGET static inline void NAME(floats)(float *to, const char *from, int count)
{
    for (int i = 0; i < count; i += WIDTH)
        V_STORE(to + i, V_HALVES(from + 2 * i));
}

/* scores[cell][row] = keys[cell] · queries[row], for rows [first, last); `count`: a multiple of TILE_CELLS. */
TARGET static void NAME(scores)(const work *w, int count, int first, int last)
{
    const int dim = w->head_dim, padded = w->padded;
    for (int row = first; row < last; row += 2 * WIDTH) {
        const int both = row + WIDTH < last;
        const float *queries = w->queries + row;
        for (int cell = 0; cell < count; cell += TILE_CELLS) {
            const float *keys = w->keys + (size_t)cell * dim;
            float *scores = w->scores + (size_t)cell * padded + row;
            VEC a[TILE_CELLS], b[TILE_CELLS];
            for (int i = 0; i < TILE_CELLS; i++)
                a[i] = b[i] = V_SET(0.0f);
            if (both) {
                for (int d = 0; d < dim; d++) {
                    VEC q0 = V_LOAD(queries + (size_t)d * padded), q1 = V_LOAD(queries + (size_t)d * padded + WIDTH);
                    for (int i = 0; i < TILE_CELLS; i++) {
                        VEC k = V_SET(keys[(size_t)i * dim + d]);
                        a[i] = V_FMA(k, q0, a[i]);
                        b[i] = V_FMA(k, q1, b[i]);
                    }
                }
            } else {
                for (int d = 0; d < dim; d++) {
                    VEC q0 = V_LOAD(queries + (size_t)d * padded);
                    for (int i = 0; i < TILE_CELLS; i++)
                        a[i] = V_FMA(V_SET(keys[(size_t)i * dim + d]), q0, a[i]);
                }
            }
            for (int i = 0; i < TILE_CELLS; i++) {
                V_STORE(scores + (size_t)i * padded, a[i]);
                if (both)
                    V_STORE(scores + (size_t)i * padded + WIDTH, b[i]);
            }
        }
    }
}

/* Replace scores by weights, relative to the new maximum of each row; scale the sum and the output so far to it. */
TARGET static void NAME(weigh)(const work *w, int count, int first, int last)
{
    const int padded = w->padded;
    for (int row = first; row < last; row += WIDTH) {
        float *scores = w->scores + row;
        VEC before = V_LOAD(w->max + row), max = before;
        for (int cell = 0; cell < count; cell++)
            max = V_MAX(max, V_LOAD(scores + (size_t)cell * padded));
        VEC base = V_MAX(max, V_SET(-3e38f)); /* a row that has seen no cell yet has the maximum -inf */
        VEC shrink = NAME(exponential)(V_SUB(V_MAX(before, V_SET(-3e38f)), base)), sum = V_SET(0.0f);
        for (int cell = 0; cell < count; cell++) {
            VEC weight = NAME(exponential)(V_SUB(V_LOAD(scores + (size_t)cell * padded), base));
            V_STORE(scores + (size_t)cell * padded, weight);
            sum = V_ADD(sum, weight);
        }
        V_STORE(w->sum + row, V_FMA(V_LOAD(w->sum + row), shrink, sum));
        V_STORE(w->max + row, max);
        float factor[WIDTH];
        V_STORE(factor, shrink);
        for (int i = 0; i < WIDTH; i++)
            if (factor[i] != 1.0f) {
                float *out = w->out + (size_t)(row + i) * w->value_dim;
                for (int d = 0; d < w->value_dim; d += WIDTH)
                    V_STORE(out + d, V_MUL(V_LOAD(out + d), V_SET(factor[i])));
            }
    }
}

/* out[row] += Σ weight[cell][row] · value[cell], for rows [first, last) */
TARGET static void NAME(collect)(const work *w, int count, int first, int last)
{
    const int dim = w->value_dim, padded = w->padded;
    for (int row = first; row < last; row += TILE_ROWS) {
        int d = 0;
        for (; d + 4 * WIDTH <= dim; d += 4 * WIDTH) {
            VEC sum[TILE_ROWS][4];
            for (int r = 0; r < TILE_ROWS; r++)
                for (int j = 0; j < 4; j++)
                    sum[r][j] = V_LOAD(w->out + (size_t)(row + r) * dim + d + j * WIDTH);
            for (int cell = 0; cell < count; cell++) {
                const float *value = w->values + (size_t)cell * dim + d;
                const float *weight = w->scores + (size_t)cell * padded + row;
                VEC v0 = V_LOAD(value), v1 = V_LOAD(value + WIDTH), v2 = V_LOAD(value + 2 * WIDTH),
                    v3 = V_LOAD(value + 3 * WIDTH);
                for (int r = 0; r < TILE_ROWS; r++) {
                    VEC p = V_SET(weight[r]);
                    sum[r][0] = V_FMA(p, v0, sum[r][0]);
                    sum[r][1] = V_FMA(p, v1, sum[r][1]);
                    sum[r][2] = V_FMA(p, v2, sum[r][2]);
                    sum[r][3] = V_FMA(p, v3, sum[r][3]);
                }
            }
            for (int r = 0; r < TILE_ROWS; r++)
                for (int j = 0; j < 4; j++)
                    V_STORE(w->out + (size_t)(row + r) * dim + d + j * WIDTH, sum[r][j]);
        }
        for (; d < dim; d += WIDTH) {
            VEC sum[TILE_ROWS];
            for (int r = 0; r < TILE_ROWS; r++)
                sum[r] = V_LOAD(w->out + (size_t)(row + r) * dim + d);
            for (int cell = 0; cell < count; cell++) {
                VEC v = V_LOAD(w->values + (size_t)cell * dim + d);
                for (int r = 0; r < TILE_ROWS; r++)
                    sum[r] = V_FMA(V_SET(w->scores[(size_t)cell * padded + row + r]), v, sum[r]);
            }
            for (int r = 0; r < TILE_ROWS; r++)
                V_STORE(w->out + (size_t)(row + r) * dim + d, sum[r]);
        }
    }
}

/* `collect` for values that may be infinite or NaN: those of weight 0 are skipped, because 0 · inf is NaN. */
TARGET static void NAME(collect_seen)(const work *w, int count, int first, int last)
{
    const int dim = w->value_dim, padded = w->padded;
    for (int row = first; row < last; row++)
        for (int cell = 0; cell < count; cell++) {
            const float weight = w->scores[(size_t)cell * padded + row];
            if (weight == 0.0f)
                continue;
            float *out = w->out + (size_t)row * dim;
            for (int d = 0; d < dim; d += WIDTH)
                V_STORE(out + d, V_FMA(V_SET(weight), V_LOAD(w->values + (size_t)cell * dim + d), V_LOAD(out + d)));
        }
}

/* Are all `count` f16 finite? (NaN is not.) */
TARGET static inline int NAME(finite)(const char *from, int count)
{
    const uint16_t *half = (const uint16_t *)from;
    unsigned odd = 0;
    for (int i = 0; i < count; i++)
        odd |= (half[i] & 0x7C00) == 0x7C00;
    return !odd;
}

TARGET static void NAME(add_masks)(const work *w, int first_cell, int count, int first, int last,
                                   const uint16_t *const *masks)
{
    for (int row = first; row < last; row++) {
        if (!masks[row])
            continue;
        const uint16_t *mask = masks[row] + first_cell;
        for (int cell = 0; cell < count; cell++) {
            float *score = w->scores + (size_t)cell * w->padded + row;
            if (mask[cell] == HIDDEN)
                *score = -INFINITY; /* even if its key is infinite or NaN */
            else if (mask[cell])
                *score += HALF(mask[cell]);
        }
    }
}

TARGET static void NAME(wide)(const work *w, const cells *c, int count, int first, int last,
                              const uint16_t *const *masks, int open)
{
    const int dim = w->head_dim, value_dim = w->value_dim;
    for (int at = 0; at < count; at += CELLS) {
        const int n = count - at < CELLS ? count - at : CELLS;
        const int full = (n + TILE_CELLS - 1) / TILE_CELLS * TILE_CELLS;
        for (int i = 0; i < n; i++) {
            NAME(floats)(w->keys + (size_t)i * dim, c->keys + (at + i) * c->key_stride, dim);
            NAME(floats)(w->values + (size_t)i * value_dim, c->values + (at + i) * c->value_stride, value_dim);
        }
        for (int i = n; i < full; i++)
            for (int d = 0; d < dim; d += WIDTH)
                V_STORE(w->keys + (size_t)i * dim + d, V_SET(0.0f));
        NAME(scores)(w, full, first, last);
        int clean = 1;
        if (masks && at + n > open) {
            NAME(add_masks)(w, at, n, first, last, masks);
            for (int i = 0; i < n && clean; i++)
                clean = NAME(finite)(c->values + (at + i) * c->value_stride, value_dim);
        }
        NAME(weigh)(w, n, first, last);
        (clean ? NAME(collect) : NAME(collect_seen))(w, n, first, last);
    }
}

/* `collect_seen` for `narrow`, whose scores lie as [row][ROWS] and whose values are still f16. */
TARGET static void NAME(gather_seen)(const work *w, const cells *c, int at, int count, int first, int last)
{
    for (int row = first; row < last; row++)
        for (int i = 0; i < count; i++) {
            const float weight = w->scores[(size_t)(row - first) * ROWS + i];
            const char *value = c->values + (at + i) * c->value_stride;
            float *out = w->out + (size_t)row * w->value_dim;
            for (int d = 0; weight != 0.0f && d < w->value_dim; d += WIDTH)
                V_STORE(out + d, V_FMA(V_SET(weight), V_HALVES(value + 2 * d), V_LOAD(out + d)));
        }
}

/* Cells are converted again for each row, which is faster for few rows. Scores are computed for one row at a time (its
 * query stays in registers when heads have 64 values), outputs for two rows at a time. */
TARGET static void NAME(narrow)(const work *w, const cells *c, int count, int first, int last, const float *queries,
                                const uint16_t *const *masks)
{
    const int dim = w->head_dim, value_dim = w->value_dim;
    for (int at = 0; at < count; at += ROWS) {
        const int n = count - at < ROWS ? count - at : ROWS;
        const int full = (n + WIDTH - 1) / WIDTH * WIDTH;
        for (int row = first; row < last; row++) {
            const float *query = queries + (size_t)(row - first) * dim;
            float *score = w->scores + (size_t)(row - first) * ROWS;
            for (int i = 0; i < n; i++) {
                const char *key = c->keys + (at + i) * c->key_stride;
                VEC sum = V_MUL(V_LOAD(query), V_HALVES(key));
                for (int d = WIDTH; d < dim; d += WIDTH)
                    sum = V_FMA(V_LOAD(query + d), V_HALVES(key + 2 * d), sum);
                score[i] = V_TOTAL(sum);
            }
            if (masks && masks[row])
                for (int i = 0; i < n; i++)
                    score[i] = masks[row][at + i] == HIDDEN ? -INFINITY : score[i] + HALF(masks[row][at + i]);
            for (int i = n; i < full; i++)
                score[i] = -INFINITY;
            VEC top = V_LOAD(score);
            for (int i = WIDTH; i < full; i += WIDTH)
                top = V_MAX(top, V_LOAD(score + i));
            float max = V_HIGHEST(top), before = w->max[row];
            max = max > before ? max : before;
            const float base = max > -3e38f ? max : -3e38f, shrink = before > -3e38f ? expf(before - base) : 0.0f;
            VEC sum = V_SET(0.0f);
            for (int i = 0; i < full; i += WIDTH) {
                VEC weight = NAME(exponential)(V_SUB(V_LOAD(score + i), V_SET(base)));
                V_STORE(score + i, weight);
                sum = V_ADD(sum, weight);
            }
            w->sum[row] = w->sum[row] * shrink + V_TOTAL(sum);
            w->max[row] = max;
            float *out = w->out + (size_t)row * value_dim;
            for (int d = 0; d < value_dim; d += WIDTH)
                V_STORE(out + d, V_MUL(V_LOAD(out + d), V_SET(shrink)));
        }
        int clean = 1;
        for (int i = 0; masks && i < n && clean; i++)
            clean = NAME(finite)(c->values + (at + i) * c->value_stride, value_dim);
        if (!clean) {
            NAME(gather_seen)(w, c, at, n, first, last);
            continue;
        }
        for (int d = 0; d < value_dim; d += 4 * WIDTH) {
            const int parts = value_dim - d >= 4 * WIDTH ? 4 : (value_dim - d) / WIDTH;
            for (int row = first; row < last; row += 2) {
                const int two = row + 1 < last;
                const float *p = w->scores + (size_t)(row - first) * ROWS, *q = two ? p + ROWS : p;
                VEC a[4], b[4];
                for (int j = 0; j < 4; j++)
                    a[j] = b[j] = V_SET(0.0f);
                if (parts == 4) {
                    for (int i = 0; i < n; i++) {
                        const char *value = c->values + (at + i) * c->value_stride + 2 * d;
                        const VEC x = V_SET(p[i]), y = V_SET(q[i]);
                        for (int j = 0; j < 4; j++) {
                            const VEC v = V_HALVES(value + 2 * j * WIDTH);
                            a[j] = V_FMA(x, v, a[j]);
                            b[j] = V_FMA(y, v, b[j]);
                        }
                    }
                } else {
                    for (int i = 0; i < n; i++)
                        for (int j = 0; j < parts; j++) {
                            const VEC v =
                                V_HALVES(c->values + (at + i) * c->value_stride + 2 * (d + j * WIDTH));
                            a[j] = V_FMA(V_SET(p[i]), v, a[j]);
                            b[j] = V_FMA(V_SET(q[i]), v, b[j]);
                        }
                }
                for (int j = 0; j < parts; j++) {
                    float *out = w->out + (size_t)row * value_dim + d + j * WIDTH;
                    V_STORE(out, V_ADD(V_LOAD(out), a[j]));
                    if (two)
                        V_STORE(out + value_dim, V_ADD(V_LOAD(out + value_dim), b[j]));
                }
            }
        }
    }
}

TARGET static void NAME(finish)(const work *w, int row, float *target)
{
    const float sum = w->sum[row], factor = sum > 0.0f ? 1.0f / sum : 0.0f;
    const float *out = w->out + (size_t)row * w->value_dim;
    for (int d = 0; d < w->value_dim; d += WIDTH)
        V_STORE(target + d, V_MUL(V_LOAD(out + d), V_SET(factor)));
}

TARGET static int NAME(visible)(const uint16_t *mask, int count, int *from, int *plain)
{
    int first = 0;
    while (count && mask[count - 1] == HIDDEN)
        count--;
    while (first < count && mask[first] == HIDDEN)
        first++;
    unsigned other = 0;
    for (int i = first; i < count; i++)
        other |= mask[i];
    *from = first;
    *plain = !other;
    return count;
}

const kernel NAME(kernel) = {WIDTH, NAME(wide), NAME(narrow), NAME(finish), NAME(visible)};
