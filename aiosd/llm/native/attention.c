/* Attention on the CPU for sequences of different lengths with common beginnings, in place of llama.cpp's own.
 *
 * llama.cpp keeps each sequence in its own stream of the KV cache, and a decode step reads every stream as far as the
 * longest of them reaches, in steps of 256 cells. Sequences that begin with the same tokens each have a copy of them.
 * Here each row reads only the cells that it may see. K and V that many sequences share may be kept once, outside of
 * the cache (a `base`). They are read once for all these sequences, and the partial softmax over them is merged with
 * that over each sequence's own cells.
 *
 * How it gets into the graph: llama.cpp calls `aios_attention_rewrite` (as `cb_eval`) for each node of a graph before
 * it is computed. A flash attention node is turned into a custom operation that calls `compute` below, in llama.cpp's
 * own threads. Nodes that this file cannot compute stay as they are. While `judging` is set, the callback also asks for
 * a call after each attention node, and compares its result with exact arithmetic.
 *
 * Plain C. Memory is allocated for a scratch buffer per thread, which lives as long as the context, and by `judge`.
 */

#include "attention.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* ggml_tensor as in ggml.h; attention.py compares size and fields with those of the loaded library. */
struct tensor {
    int32_t type;
    void *buffer;
    int64_t ne[4];
    size_t nb[4];
    int32_t op;
    int32_t op_params[16];
    int32_t flags;
    struct tensor *src[10];
    struct tensor *view_src;
    size_t view_offs;
    char *data;
    char name[64];
    void *extra;
    char padding[8];
};

enum { F32 = 0, F16 = 1 };
enum { HEAD = 256 };         /* the largest head, in values */
enum { MOST_THREADS = 512 }; /* ggml's GGML_MAX_N_THREADS */

struct scratch;

/* One for each context of llama.cpp. attention.py has the same layout, and may change it between two decodes. */
struct attention {
    int32_t op_flash, op_custom; /* numbers of these operations in this ggml */
    int32_t enabled;             /* 0: nodes are restored to the original */
    int32_t threads;
    int32_t streams, layers;
    const int64_t *key_at, *value_at; /* per layer: where its K, its V begin in a run, in bytes per token */
    const run *runs;
    const int32_t *base_run;    /* per stream: the first run of its base */
    const int32_t *base_length; /* per stream: how many tokens of the base are used; 0: no base */
    int64_t rewritten;          /* nodes rewritten so far */
    int64_t refused;            /* nodes that could not be rewritten */
    const char *why;            /* the reason for the last of them */
    /* Used for the trial when a model is loaded, see `judge`. judging: 1, compare every node with exact arithmetic; 2,
     * also compute it with the first `skip` cells read from the base instead of the cache. theirs, ours, based: the
     * largest errors, relative to the largest value of their node, of llama.cpp's attention, of ours, and of ours with
     * a base. */
    int32_t judging, skip;
    double theirs, ours, based;
    struct scratch *scratch[MOST_THREADS];
};

typedef void (*operation)(struct tensor *, int, int, void *);

/* op_params of a rewritten node: the three fields that ggml reads of a custom operation, then the op_params of the
 * original operation, and the layer. */
struct params {
    operation function;
    int32_t tasks;
    void *attention;
    int32_t original[6];
    int32_t layer;
};

_Static_assert(sizeof(struct params) <= 64, "op_params hold 64 bytes");

/* ── instruction sets ─────────────────────────────────────────────────────────────────────────────────────────── */

#define HALF(x) half_to_float(x)
/* The bits of a half are placed where a float has them; the multiplication corrects the exponent's bias, and normalises
 * subnormal numbers. */
static inline float half_to_float(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7FFF;
    union {
        uint32_t bits;
        float value;
    } all = {rest << 13}, scale = {0x77800000}; /* 2^112 */
    if (rest >= 0x7C00)
        all.bits |= 0x7F800000;
    else
        all.value *= scale.value;
    all.bits |= sign;
    return all.value;
}

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define NAME(x) x##_avx2
#define VEC __m256
#define WIDTH 8
#define TILE_CELLS 4
#define TILE_ROWS 2
#define V_SET(x) _mm256_set1_ps(x)
#define V_LOAD(p) _mm256_loadu_ps(p)
#define V_STORE(p, v) _mm256_storeu_ps(p, v)
#define V_HALVES(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define V_ADD(a, b) _mm256_add_ps(a, b)
#define V_SUB(a, b) _mm256_sub_ps(a, b)
#define V_MUL(a, b) _mm256_mul_ps(a, b)
#define V_MAX(a, b) _mm256_max_ps(a, b)
#define V_FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define V_ABOVE(p, x, low) _mm256_and_ps(p, _mm256_cmp_ps(x, V_SET(low), _CMP_NLE_UQ))
#define V_SCALE2(p, n) \
    _mm256_castsi256_ps( \
        _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(n), 23)))
TARGET static inline float total_avx2(__m256 v)
{
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
TARGET static inline float highest_avx2(__m256 v)
{
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
#define V_TOTAL(v) total_avx2(v)
#define V_HIGHEST(v) highest_avx2(v)
#include "kernel.h"
#undef TARGET
#undef NAME
#undef VEC
#undef WIDTH
#undef TILE_CELLS
#undef TILE_ROWS
#undef V_SET
#undef V_LOAD
#undef V_STORE
#undef V_HALVES
#undef V_ADD
#undef V_SUB
#undef V_MUL
#undef V_MAX
#undef V_FMA
#undef V_ABOVE
#undef V_SCALE2
#undef V_TOTAL
#undef V_HIGHEST

#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx2,fma,f16c")))
#define NAME(x) x##_avx512
#define VEC __m512
#define WIDTH 16
#define TILE_CELLS 8
#define TILE_ROWS 4
#define V_SET(x) _mm512_set1_ps(x)
#define V_LOAD(p) _mm512_loadu_ps(p)
#define V_STORE(p, v) _mm512_storeu_ps(p, v)
#define V_HALVES(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define V_ADD(a, b) _mm512_add_ps(a, b)
#define V_SUB(a, b) _mm512_sub_ps(a, b)
#define V_MUL(a, b) _mm512_mul_ps(a, b)
#define V_MAX(a, b) _mm512_max_ps(a, b)
#define V_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define V_ABOVE(p, x, low) _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, V_SET(low), _CMP_NLE_UQ), p)
#define V_SCALE2(p, n) \
    _mm512_castsi512_ps( \
        _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(n), 23)))
#define V_TOTAL(v) _mm512_reduce_add_ps(v)
#define V_HIGHEST(v) _mm512_reduce_max_ps(v)
#include "kernel.h"

static const kernel *best_kernel(void)
{
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
        return &kernel_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return &kernel_avx2;
    return NULL;
}
#else
static const kernel *best_kernel(void)
{
    return NULL;
}
#endif

static const kernel *use;

/* Call once, before anything else. `width`: use vectors of at most this many floats (0: no limit). Returns the width
 * that is used, or 0 if there is no kernel for this processor. */
int aios_attention_start(int width)
{
    use = best_kernel();
#if defined(__x86_64__)
    if (use && width && width < use->width)
        use = &kernel_avx2;
#endif
    return use ? use->width : 0;
}

/* ── one node ─────────────────────────────────────────────────────────────────────────────────────────────────── */

/* A unit of work: some consecutive tokens of one stream. */
struct item {
    int stream, token, tokens;
    int from, cells; /* no token sees a cell outside of [from, cells); with a sliding window `from` is above 0 */
    int open;        /* all tokens see all cells of [from, open), and the mask values of these are 0 */
    int64_t cost;    /* estimated, to give threads equal shares */
};

struct scratch {
    work w;
    void *all;     /* the allocation that holds `packed` and the arrays of `w` */
    float *packed; /* queries of few rows, [row][head_dim], scaled */
    struct item *items;
    int capacity;
};

/* The scratch buffer of a thread, by its index. It belongs to the context: llama.cpp may replace its threads. */
static struct scratch *scratch(struct attention *a, int thread, int items)
{
    if (thread >= MOST_THREADS)
        abort(); /* no error can be returned from inside a graph; llama.cpp aborts, too */
    struct scratch *mine = a->scratch[thread];
    if (!mine) {
        const size_t floats = HEAD * ROWS + 2 * CELLS * HEAD + CELLS * ROWS + 2 * ROWS + ROWS * HEAD + 8 * HEAD;
        mine = calloc(1, sizeof *mine);
        float *at = aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
        if (!mine || !at)
            abort();
        mine->all = at;
        mine->w.queries = at, at += HEAD * ROWS;
        mine->w.keys = at, at += CELLS * HEAD;
        mine->w.values = at, at += CELLS * HEAD;
        mine->w.scores = at, at += CELLS * ROWS;
        mine->w.max = at, at += ROWS;
        mine->w.sum = at, at += ROWS;
        mine->w.out = at, at += ROWS * HEAD;
        mine->packed = at;
        a->scratch[thread] = mine;
    }
    if (mine->capacity < items) {
        free(mine->items);
        mine->items = malloc(items * sizeof *mine->items);
        if (!mine->items)
            abort();
        mine->capacity = items;
    }
    return mine;
}

/* Call after the context is closed, when no thread can use the buffers any more. */
void aios_attention_free(struct attention *a)
{
    for (int i = 0; i < MOST_THREADS; i++) {
        if (a->scratch[i]) {
            free(a->scratch[i]->all);
            free(a->scratch[i]->items);
            free(a->scratch[i]);
        }
        a->scratch[i] = NULL;
    }
}

/* One attention: queries f32 [stream][head][token][dim], keys and values f16 [stream][KV head][cell][dim]. */
struct node {
    struct attention *a;
    const struct tensor *q, *k, *v, *mask;
    float *out; /* [stream][token][head][value_dim] */
    int streams, tokens, heads, kv_heads, share, cells, dim, value_dim, layer;
    int first_stream; /* of the cache */
    float scale;
};

/* Which stream of the cache is the first of this batch: `k` is a view of the cache that begins there. */
static int first_stream(const struct tensor *k)
{
    return k->view_src && k->nb[3] ? (int)((k->data - k->view_src->data) / k->nb[3]) : 0;
}

static const uint16_t *mask_of(const struct node *n, int stream, int token)
{
    const struct tensor *m = n->mask;
    return (const uint16_t *)(m->data + (stream % m->ne[3]) * m->nb[3] + token * m->nb[1]);
}

static const float *query(const struct node *n, int stream, int token, int head)
{
    const struct tensor *q = n->q;
    return (const float *)(q->data + stream * q->nb[3] + head * q->nb[2] + token * q->nb[1]);
}

static int base_length(const struct node *n, int stream)
{
    const int at = n->first_stream + stream;
    return n->layer < n->a->layers && at < n->a->streams ? n->a->base_length[at] : 0;
}

static int base_of(const struct node *n, int stream)
{
    return base_length(n, stream) ? n->a->base_run[n->first_stream + stream] : -1;
}

static bool same_base(const struct node *n, int a, int b)
{
    return base_length(n, a) == base_length(n, b) && base_of(n, a) == base_of(n, b);
}

/* Put items of the same base next to each other. Insertion sort: there are few bases, and the order is mostly right. */
static void sort_by_base(const struct node *n, struct item *items, int count)
{
    for (int i = 1; i < count; i++) {
        const struct item item = items[i];
        const int base = base_of(n, item.stream);
        int at = i;
        for (; at > 0 && base_of(n, items[at - 1].stream) > base; at--)
            items[at] = items[at - 1];
        items[at] = item;
    }
}

/* Divide the work into items; returns how many. All threads compute the same division, so they need not communicate. */
static int cut(const struct node *n, struct scratch *s, int per_item)
{
    int count = 0;
    for (int stream = 0; stream < n->streams; stream++)
        for (int token = 0; token < n->tokens; token += per_item) {
            struct item *item = &s->items[count++];
            item->stream = stream;
            item->token = token;
            item->tokens = n->tokens - token < per_item ? n->tokens - token : per_item;
            item->cells = 0;
            item->from = item->open = n->cells;
            int latest = 0;
            for (int i = 0; i < item->tokens; i++) {
                int from, plain;
                const int seen = use->visible(mask_of(n, stream, token + i), n->cells, &from, &plain);
                const int open = plain ? seen : 0;
                item->open = open < item->open ? open : item->open;
                item->cells = seen > item->cells ? seen : item->cells;
                item->from = from < item->from ? from : item->from;
                latest = from > latest ? from : latest;
            }
            if (latest > item->from)
                item->open = 0;
            item->cost = (int64_t)item->tokens * (item->cells - item->from + base_length(n, stream) / 4 + 16);
        }
    sort_by_base(n, s->items, count);
    return count;
}

/* The items [*from, *to) of one KV head that this thread computes. The items of all heads, one head after another, are
 * divided into one share of about equal cost for each thread. */
static void share_of(const struct node *n, const struct item *items, int count, int kv_head, int thread, int threads,
                     int *from, int *to)
{
    int64_t each = 0;
    for (int i = 0; i < count; i++)
        each += items[i].cost;
    int64_t before = kv_head * each;
    *from = *to = 0;
    for (int i = 0; i < count; i++) {
        const int owner = (int)((before + items[i].cost / 2) * threads / (each * n->kv_heads));
        before += items[i].cost;
        if (owner == thread) {
            *from = *from == *to ? i : *from;
            *to = i + 1;
        }
    }
}

static void load_queries(const struct node *n, work *w, const struct item *item, int kv_head, int first)
{
    for (int token = 0; token < item->tokens; token++)
        for (int g = 0; g < n->share; g++) {
            const float *from = query(n, item->stream, item->token + token, kv_head * n->share + g);
            float *to = w->queries + first + token * n->share + g;
            for (int d = 0; d < n->dim; d++)
                to[(size_t)d * w->padded] = from[d] * n->scale;
        }
}

static void pack_queries(const struct node *n, struct scratch *s, const struct item *item, int kv_head, int first)
{
    for (int row = 0; row < item->tokens * n->share; row++) {
        const int token = item->token + row / n->share, head = kv_head * n->share + row % n->share;
        const float *from = query(n, item->stream, token, head);
        float *to = s->packed + (size_t)(first + row) * n->dim;
        for (int d = 0; d < n->dim; d++)
            to[d] = from[d] * n->scale;
    }
}

/* Read the base of a stream for all rows in `w`. `few`: with the kernel for few rows, whose queries lie in `packed`. */
static void read_base(const struct node *n, const struct scratch *s, int stream, int kv_head, bool few)
{
    const work *w = &s->w;
    const int at = n->first_stream + stream;
    const size_t key_row = n->k->nb[1], value_row = n->v->nb[1];
    const run *run = n->a->runs + n->a->base_run[at];
    for (int64_t left = base_length(n, stream); left > 0; left -= run->cells, run++) {
        const cells c = {
            run->data + n->a->key_at[n->layer] * run->cells + kv_head * n->k->nb[2],
            run->data + n->a->value_at[n->layer] * run->cells + kv_head * n->v->nb[2],
            key_row,
            value_row,
        };
        const int count = (int)(left < run->cells ? left : run->cells);
        if (few)
            use->narrow(w, &c, count, 0, w->rows, s->packed, NULL);
        else
            use->wide(w, &c, count, 0, w->padded, NULL, 0);
    }
}

static void read_own(const struct node *n, struct scratch *s, const struct item *item, int kv_head, int first, int rows,
                     bool narrow)
{
    const int from = item->from, count = item->cells - from;
    if (count <= 0)
        return;
    const uint16_t *masks[ROWS] = {0};
    const cells c = {
        n->k->data + item->stream * n->k->nb[3] + kv_head * n->k->nb[2] + from * n->k->nb[1],
        n->v->data + item->stream * n->v->nb[3] + kv_head * n->v->nb[2] + from * n->v->nb[1],
        n->k->nb[1],
        n->v->nb[1],
    };
    const bool plain = item->open >= item->cells;
    if (!plain)
        for (int row = 0; row < rows; row++)
            masks[first + row] = mask_of(n, item->stream, item->token + row / n->share) + from;
    if (narrow) {
        pack_queries(n, s, item, kv_head, 0);
        use->narrow(&s->w, &c, count, first, first + rows, s->packed, plain ? NULL : masks);
        return;
    }
    const int last = first + (rows + use->width - 1) / use->width * use->width;
    use->wide(&s->w, &c, count, first, last, plain ? NULL : masks, item->open - from);
}

static void reset(work *w, int columns)
{
    for (int i = 0; i < columns; i++) {
        w->max[i] = -INFINITY;
        w->sum[i] = 0.0f;
    }
    memset(w->out, 0, (size_t)columns * w->value_dim * sizeof(float));
}

/* Compute items [from, to) of one KV head, which read the same base in one pass. */
static void together(const struct node *n, struct scratch *s, int from, int to, int kv_head)
{
    work *w = &s->w;
    const struct item *items = s->items;
    int first[ROWS], columns = 0;
    const bool narrow = items[from].tokens * n->share < use->width / 2;
    for (int i = from; i < to; i++) {
        const int rows = items[i].tokens * n->share;
        first[i - from] = columns;
        columns += narrow ? rows : (rows + use->width - 1) / use->width * use->width;
    }
    w->rows = columns;
    w->padded = (columns + use->width - 1) / use->width * use->width;
    reset(w, w->padded);
    const int base = base_length(n, items[from].stream);
    const bool few = narrow && columns < use->width / 2;
    if (!narrow || (base && !few)) {
        memset(w->queries, 0, (size_t)w->head_dim * w->padded * sizeof(float));
        for (int i = from; i < to; i++)
            load_queries(n, w, &items[i], kv_head, first[i - from]);
    }
    for (int i = from; base && few && i < to; i++)
        pack_queries(n, s, &items[i], kv_head, first[i - from]);
    if (base)
        read_base(n, s, items[from].stream, kv_head, few);
    for (int i = from; i < to; i++) {
        const struct item *item = &items[i];
        const int rows = item->tokens * n->share;
        read_own(n, s, item, kv_head, first[i - from], rows, narrow);
        for (int row = 0; row < rows; row++) {
            const int token = item->token + row / n->share, head = kv_head * n->share + row % n->share;
            use->finish(w, first[i - from] + row,
                        n->out + (((size_t)item->stream * n->tokens + token) * n->heads + head) * n->value_dim);
        }
    }
}

/* The end of the items from `at` on that can share one pass: they have the same base, and all or none have few rows. */
static int group(const struct node *n, const struct item *items, int at, int to)
{
    const bool narrow = items[at].tokens * n->share < use->width / 2;
    int columns = 0, end = at;
    while (end < to) {
        const int rows = items[end].tokens * n->share;
        if ((rows < use->width / 2) != narrow || (end > at && !same_base(n, items[at].stream, items[end].stream)))
            break;
        columns += narrow ? rows : (rows + use->width - 1) / use->width * use->width;
        if (columns > ROWS)
            break;
        end++;
    }
    return end;
}

static void shape(struct node *n)
{
    n->dim = (int)n->q->ne[0], n->tokens = (int)n->q->ne[1], n->heads = (int)n->q->ne[2], n->streams = (int)n->q->ne[3];
    n->cells = (int)n->k->ne[1], n->kv_heads = (int)n->k->ne[2], n->share = n->heads / n->kv_heads;
    n->value_dim = (int)n->v->ne[0];
    n->first_stream = first_stream(n->k);
}

static void compute_node(const struct node *n, int thread, int threads)
{
    /* Tokens per item: few enough to give every thread an item, enough to fill a vector with rows. */
    const int most = ROWS / n->share, least = (use->width + n->share - 1) / n->share;
    const int even = (n->tokens * n->streams * n->kv_heads + threads - 1) / threads;
    const int per_item = even > most ? most : even > least ? even : least < most ? least : most;
    struct scratch *s = scratch(n->a, thread, n->streams * (n->tokens / per_item + 1));
    s->w.head_dim = n->dim;
    s->w.value_dim = n->value_dim;
    const int count = cut(n, s, per_item);
    for (int kv_head = 0; kv_head < n->kv_heads; kv_head++) {
        int from, to;
        share_of(n, s->items, count, kv_head, thread, threads, &from, &to);
        for (int at = from, end; at < to; at = end) {
            end = group(n, s->items, at, to);
            together(n, s, at, end, kv_head);
        }
    }
}

static void compute(struct tensor *dst, int thread, int threads, void *data)
{
    struct params p;
    memcpy(&p, dst->op_params, sizeof p);
    struct node n = {.a = data, .q = dst->src[0], .k = dst->src[1], .v = dst->src[2], .mask = dst->src[3]};
    n.out = (float *)dst->data;
    n.layer = p.layer;
    memcpy(&n.scale, p.original, sizeof n.scale);
    shape(&n);
    compute_node(&n, thread, threads);
}

/* ── comparison with exact arithmetic ──────────────────────────────────────────────────────────────────────────── */

static double score(const struct node *n, int stream, int token, int head, int cell)
{
    const float mask = HALF(mask_of(n, stream, token)[cell]);
    if (mask == -INFINITY)
        return -INFINITY;
    const char *key = n->k->data + stream * n->k->nb[3] + head / n->share * n->k->nb[2] + cell * n->k->nb[1];
    double sum = 0;
    for (int d = 0; d < n->dim; d++)
        sum += (double)query(n, stream, token, head)[d] * HALF(((const uint16_t *)key)[d]);
    return sum * n->scale + mask;
}

/* The output of one row, by the definition of attention, in double precision. */
static void exact(const struct node *n, int stream, int token, int head, double *out)
{
    double max = -INFINITY, total = 0;
    for (int cell = 0; cell < n->cells; cell++) {
        const double s = score(n, stream, token, head, cell);
        max = s > max ? s : max;
    }
    for (int d = 0; d < n->value_dim; d++)
        out[d] = 0;
    for (int cell = 0; cell < n->cells; cell++) {
        const double weight = exp(score(n, stream, token, head, cell) - max);
        const char *value = n->v->data + stream * n->v->nb[3] + head / n->share * n->v->nb[2] + cell * n->v->nb[1];
        if (weight == 0)
            continue;
        total += weight;
        for (int d = 0; d < n->value_dim; d++)
            out[d] += weight * HALF(((const uint16_t *)value)[d]);
    }
    for (int d = 0; d < n->value_dim; d++)
        out[d] /= total;
}

/* The largest error of `out`, relative to the largest value; infinite if a value is NaN or infinite. */
static double distance(const struct node *n, const float *out)
{
    double row[HEAD], largest = 1e-30, error = 0;
    for (int stream = 0; stream < n->streams; stream++)
        for (int token = 0; token < n->tokens; token++)
            for (int head = 0; head < n->heads; head++, out += n->value_dim) {
                exact(n, stream, token, head, row);
                for (int d = 0; d < n->value_dim; d++) {
                    const double off = fabs(row[d] - out[d]);
                    if (!(off < INFINITY))
                        return INFINITY;
                    largest = fabs(row[d]) > largest ? fabs(row[d]) : largest;
                    error = off > error ? off : error;
                }
            }
    return error / largest;
}

/* The error of the same node when our attention computes it without its first `skip` cells, which the base holds. */
static double distance_with_base(const struct node *n, int skip)
{
    struct tensor k = *n->k, v = *n->v, mask = *n->mask;
    struct node without = *n;
    float *out = malloc((size_t)n->streams * n->tokens * n->heads * n->value_dim * sizeof *out);
    if (!out)
        abort();
    k.data += skip * k.nb[1], k.ne[1] -= skip;
    v.data += skip * v.nb[1], v.ne[1] -= skip;
    mask.data += skip * mask.nb[0], mask.ne[0] -= skip;
    without.k = &k, without.v = &v, without.mask = &mask, without.out = out;
    shape(&without);
    compute_node(&without, 0, 1);
    const double error = distance(n, out);
    free(out);
    return error;
}

static void worst(double *of, double error)
{
    if (!(error <= *of))
        *of = error;
}

/* Compare the result of a node that was computed, by llama.cpp or by us, with exact arithmetic on the same inputs.
 * Logits cannot be compared instead: a quantised model rounds activations to 8 bits after each node, so that the logits
 * of any two orders of summation differ by some percent. */
static void judge(struct tensor *t, struct attention *a, bool rewritten, int layer)
{
    struct node n = {.a = a, .q = t->src[0], .k = t->src[1], .v = t->src[2], .mask = t->src[3], .layer = layer};
    struct params p;
    memcpy(&p, t->op_params, sizeof p);
    memcpy(&n.scale, rewritten ? (const void *)p.original : (const void *)t->op_params, sizeof n.scale);
    n.out = (float *)t->data;
    shape(&n);
    worst(rewritten ? &a->ours : &a->theirs, distance(&n, n.out));
    if (a->judging == 2)
        worst(&a->based, distance_with_base(&n, a->skip));
}

/* ── into the graph ───────────────────────────────────────────────────────────────────────────────────────────── */

static bool rows_of(const struct tensor *t, int32_t type, size_t item)
{
    return t && t->type == type && t->nb[0] == item;
}

/* The reason why `compute` cannot compute this node; NULL: it can. */
static const char *unfit(const struct tensor *t)
{
    const struct tensor *q = t->src[0], *k = t->src[1], *v = t->src[2], *mask = t->src[3];
    float bias, cap;
    memcpy(&bias, t->op_params + 1, sizeof bias);
    memcpy(&cap, t->op_params + 2, sizeof cap);
    if (cap != 0.0f)
        return "the model caps its attention scores";
    if (bias != 0.0f)
        return "the model weakens attention by distance";
    if (t->src[4])
        return "the model has attention sinks";
    if (!rows_of(k, F16, 2) || !rows_of(v, F16, 2))
        return "keys and values are not kept as f16";
    if (t->type != F32 || !rows_of(q, F32, 4) || !rows_of(mask, F16, 2) || mask->ne[2] != 1)
        return "the model computes attention in another form";
    if (q->ne[0] != k->ne[0] || q->ne[0] > HEAD || v->ne[0] > HEAD || q->ne[0] % use->width || v->ne[0] % use->width)
        return "the width of the model's heads is above 256 or no multiple of a vector";
    if (k->ne[2] != v->ne[2] || q->ne[2] % k->ne[2] || q->ne[2] / k->ne[2] > ROWS)
        return "the model's heads share keys in another way";
    if (q->ne[3] != k->ne[3] || k->ne[3] != v->ne[3] || k->ne[1] != mask->ne[0])
        return "the model lays out its cache in another way";
    return NULL;
}

static int layer_of(const struct tensor *t)
{
    static const char prefix[] = "cache_k_l";
    const struct tensor *cache = t->src[1]->view_src;
    if (!cache || strncmp(cache->name, prefix, sizeof prefix - 1))
        return INT32_MAX; /* K is not in llama.cpp's cache, so there can be no base */
    return atoi(cache->name + sizeof prefix - 1);
}

/* Are there fewer units of work (tokens × KV heads) than threads? Then llama.cpp is faster, because it also divides the
 * cells among threads. But only `compute` can read a base. */
static bool too_few(const struct tensor *t, const struct attention *a)
{
    const struct tensor *q = t->src[0], *k = t->src[1];
    if (q->ne[1] * q->ne[3] * k->ne[2] >= a->threads)
        return false;
    const int first = first_stream(k);
    for (int stream = first; stream < first + q->ne[3] && stream < a->streams; stream++)
        if (a->base_length[stream])
            return false;
    return true;
}

/* llama.cpp's cb_eval (see the top of the file), called at every use of a graph, also of a reused one. `ask`: the node
 * is not yet computed; true asks for a second call when it is. In that call true means that the graph goes on. */
bool aios_attention_rewrite(struct tensor *t, bool ask, struct attention *a)
{
    struct params p;
    memcpy(&p, t->op_params, sizeof p);
    const bool rewritten = t->op == a->op_custom && p.function == compute;
    if (t->op != a->op_flash && !rewritten)
        return false;
    if (!ask) {
        judge(t, a, rewritten, layer_of(t));
        return true;
    }
    const char *why = rewritten ? NULL : unfit(t);
    const bool own = a->enabled && !why && !too_few(t, a);
    if (why && a->enabled) {
        a->refused++;
        a->why = why;
    }
    if (own && !rewritten) {
        memset(&p, 0, sizeof p);
        memcpy(p.original, t->op_params, sizeof p.original);
        p.function = compute;
        p.tasks = -1; /* one task per thread */
        p.attention = a;
        p.layer = layer_of(t);
        memcpy(t->op_params, &p, sizeof p);
        t->op = a->op_custom;
        a->rewritten++;
    } else if (!own && rewritten) {
        memset(t->op_params, 0, sizeof t->op_params);
        memcpy(t->op_params, p.original, sizeof p.original);
        t->op = a->op_flash;
    }
    return a->judging && !why;
}

/* Do ggml's tensors have the layout of `struct tensor`? `t`: 3 × 5 floats, named "probe"; `view`: a view of two of
 * them, from the third on; `scaled`: t times 2, by the operation with the number `scale`. */
int aios_attention_knows(const struct tensor *t, const struct tensor *view, const struct tensor *scaled, int scale)
{
    float factor;
    memcpy(&factor, scaled->op_params, sizeof factor);
    return t->type == F32 && t->ne[0] == 3 && t->ne[1] == 5 && t->ne[2] == 1 && t->nb[0] == 4 && t->nb[1] == 12 &&
           !strcmp(t->name, "probe") && t->data && view->view_src == t && view->view_offs == 8 &&
           view->data == t->data + 8 && scaled->op == scale && scaled->src[0] == t &&
           !scaled->src[1] && factor == 2.0f;
}
