/* Draws one token from each row of logits. sampling.py defines the result, and this file gives the same bits: both do
 * the same operations on doubles in the same order. So there is no fused multiply-add (-ffp-contract=off), sums are
 * added one number after the other, and the exponential is our own. A "word" is a token of the vocabulary with its
 * logit.
 *
 * A row is read once. With top-k, a heap keeps the k largest words so far, and a vectorised comparison skips whole
 * blocks in which no word is larger than the smallest of these. The later steps work only on the words that are left.
 * NaN and -inf are never drawn.
 *
 * Plain C. The caller gives all memory. Several threads may run this at a time, each with its own scratch memory.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 64      /* how many words are compared at once; the vocabulary need not be a multiple of it */
#define MOST_HEAP 512 /* for a larger k all words are sorted, without a heap */
#define CHUNK 256     /* how many weights are computed at once */
#define SMALL 48      /* up to this many words are sorted by insertion, more by radix sort */

/* The same layout as the array DRAW in sampling.py. */
typedef struct {
    double temperature, top_p, min_p, xtc_probability, xtc_threshold;
    uint64_t seed;
    int64_t index;
    int64_t row;
    int64_t top_k; /* 0: off */
} params;

typedef struct {
    float logit;
    int32_t id;
} word;

/* ── the same loops, compiled for each instruction set ────────────────────────────────────────────────────────── */

#define BODY static inline __attribute__((always_inline))

BODY float largest_body(const float *row, int64_t n)
{
    float lanes[32], most = -INFINITY;
    int64_t i = 0;
    for (int j = 0; j < 32; j++)
        lanes[j] = -INFINITY;
    for (; i + 32 <= n; i += 32)
        for (int j = 0; j < 32; j++)
            lanes[j] = row[i + j] > lanes[j] ? row[i + j] : lanes[j]; /* false for NaN */
    for (; i < n; i++)
        most = row[i] > most ? row[i] : most;
    for (int j = 0; j < 32; j++)
        most = lanes[j] > most ? lanes[j] : most;
    return most;
}

/* Is any word of the block above the limit? */
BODY int any_above_body(const float *block, float limit)
{
    int32_t above[16] = {0}, any = 0;
    for (int i = 0; i < BLOCK; i += 16)
        for (int j = 0; j < 16; j++)
            above[j] |= block[i + j] > limit;
    for (int j = 0; j < 16; j++)
        any |= above[j];
    return any;
}

/* Where the first block from `i` on that has a word above the limit begins. If there is none: where the rest that is
 * shorter than a block begins. */
BODY int64_t next_block_body(const float *row, int64_t i, int64_t n, float limit)
{
    while (i + BLOCK <= n && !any_above_body(row + i, limit))
        i += BLOCK;
    return i;
}

/* e^x for x ≤ 0; 0 below -708. x = n · ln 2 + r, then a polynomial in r. `exponential` in sampling.py. */
BODY void exponentials_body(const double *x, double *y, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        const double at = x[i] > -708.0 ? x[i] : -708.0;
        const double shifted = at * 1.4426950408889634 + 6755399441055744.0;
        const double whole = shifted - 6755399441055744.0;
        const double r = (at - whole * 0.6931471803691238) - whole * 1.9082149292705877e-10;
        double p = 1.6059043836821613e-10;
        p = p * r + 2.08767569878681e-09;
        p = p * r + 2.505210838544172e-08;
        p = p * r + 2.755731922398589e-07;
        p = p * r + 2.7557319223985893e-06;
        p = p * r + 2.48015873015873e-05;
        p = p * r + 0.0001984126984126984;
        p = p * r + 0.001388888888888889;
        p = p * r + 0.008333333333333333;
        p = p * r + 0.041666666666666664;
        p = p * r + 0.16666666666666666;
        p = p * r + 0.5;
        p = p * r + 1.0;
        p = p * r + 1.0;
        uint64_t bits;
        memcpy(&bits, &shifted, 8);
        bits = (bits + 1023) << 52; /* the low bits of `shifted` are the whole number */
        double power;
        memcpy(&power, &bits, 8);
        y[i] = x[i] < -708.0 ? 0.0 : p * power;
    }
}

static float largest_plain(const float *row, int64_t n) { return largest_body(row, n); }
static int64_t next_block_plain(const float *row, int64_t i, int64_t n, float limit)
{
    return next_block_body(row, i, n, limit);
}
static void exponentials_plain(const double *x, double *y, int64_t n) { exponentials_body(x, y, n); }

static float (*largest)(const float *, int64_t) = largest_plain;
static int64_t (*next_block)(const float *, int64_t, int64_t, float) = next_block_plain;
static void (*exponentials)(const double *, double *, int64_t) = exponentials_plain;

#if defined(__x86_64__) && defined(__GNUC__)
#define AVX2 __attribute__((target("avx2")))
AVX2 static float largest_avx2(const float *row, int64_t n) { return largest_body(row, n); }
AVX2 static int64_t next_block_avx2(const float *row, int64_t i, int64_t n, float limit)
{
    return next_block_body(row, i, n, limit);
}
AVX2 static void exponentials_avx2(const double *x, double *y, int64_t n) { exponentials_body(x, y, n); }

void aios_sampling_start(int vectors)
{
    const int wide = vectors && __builtin_cpu_supports("avx2");
    largest = wide ? largest_avx2 : largest_plain;
    next_block = wide ? next_block_avx2 : next_block_plain;
    exponentials = wide ? exponentials_avx2 : exponentials_plain;
}
#else
void aios_sampling_start(int vectors) { (void)vectors; }
#endif

/* ── random numbers ───────────────────────────────────────────────────────────────────────────────────────────── */

/* `uniform` in sampling.py */
static double uniform(uint64_t seed, uint64_t index)
{
    uint64_t x = seed * 0xD1342543DE82EF95u + index * 0x9E3779B97F4A7C15u + 0x632BE59BD9B4E019u;
    for (int i = 0; i < 2; i++) {
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
        x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
        x ^= x >> 31;
    }
    return (double)(x >> 11) * 0x1p-53;
}

/* ── order: the largest logit first, of equal ones the smallest id ────────────────────────────────────────────── */

static inline int before(word a, word b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }

/* +inf becomes the largest number, because differences to it would not be numbers; -0 becomes 0. */
static inline float tamed(float logit) { return logit > 3.4028235e38f ? 3.4028235e38f : logit + 0.0f; }

/* Restores the heap below `at`. The root is the worst word, which a better one replaces first. */
static void sift(word *heap, int64_t size, int64_t at)
{
    const word moved = heap[at];
    for (;;) {
        int64_t child = 2 * at + 1;
        if (child >= size)
            break;
        if (child + 1 < size && before(heap[child], heap[child + 1]))
            child++;
        if (!before(moved, heap[child]))
            break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = moved;
}

/* The k best words of a row, sorted; returns how many there are. Words are read in ascending order of their ids, so
 * that of words with equal logits those with the lower ids stay. */
static int64_t first_k(const float *row, int64_t n, int64_t k, word *heap)
{
    int64_t size = 0, i = 0;
    for (; i < n && size < k; i++)
        if (row[i] > -INFINITY)
            heap[size++] = (word){tamed(row[i]), (int32_t)i};
    for (int64_t at = size / 2 - 1; at >= 0; at--)
        sift(heap, size, at);
    while (i < n) {
        i = next_block(row, i, n, heap[0].logit);
        const int64_t end = i + BLOCK < n ? i + BLOCK : n;
        for (; i < end; i++)
            if (row[i] > heap[0].logit) { /* false for NaN */
                heap[0] = (word){tamed(row[i]), (int32_t)i};
                sift(heap, size, 0);
            }
    }
    for (int64_t left = size - 1; left > 0; left--) { /* the root is the worst word of the rest, and goes to the end of it */
        const word last = heap[0];
        heap[0] = heap[left];
        heap[left] = last;
        sift(heap, left, 0);
    }
    return size;
}

static inline uint32_t sort_key(float logit)
{
    uint32_t bits;
    memcpy(&bits, &logit, 4);
    return bits & 0x80000000u ? bits : ~(bits | 0x80000000u); /* ascending keys: descending logits */
}

/* `words` are in ascending order of ids, and the sort is stable. `other`: room for as many words. Returns which of the
 * two arrays holds the result. */
static word *sorted(word *words, word *other, int64_t n)
{
    if (n <= SMALL) {
        for (int64_t i = 1; i < n; i++) {
            const word moved = words[i];
            int64_t j = i;
            for (; j > 0 && before(moved, words[j - 1]); j--)
                words[j] = words[j - 1];
            words[j] = moved;
        }
        return words;
    }
    for (int shift = 0; shift < 32; shift += 8) {
        int64_t places[257] = {0};
        for (int64_t i = 0; i < n; i++)
            places[(sort_key(words[i].logit) >> shift & 255) + 1]++;
        for (int i = 0; i < 256; i++)
            places[i + 1] += places[i];
        for (int64_t i = 0; i < n; i++)
            other[places[sort_key(words[i].logit) >> shift & 255]++] = words[i];
        word *swapped = words;
        words = other;
        other = swapped;
    }
    return words;
}

/* ── the filters ──────────────────────────────────────────────────────────────────────────────────────────────── */

typedef struct {
    word *words, *other;
    double *weights;
    int64_t count;
    double total; /* of the weights after top-k */
} survivors;

/* All words of the row, except those that are less likely than `least` times the likeliest. The total is that of the
 * weights of all words. */
static void above(const float *row, int64_t n, float most, double least, survivors *s)
{
    double x[CHUNK], weights[CHUNK];
    s->count = 0;
    s->total = 0;
    for (int64_t start = 0; start < n; start += CHUNK) {
        const int64_t count = n - start < CHUNK ? n - start : CHUNK;
        for (int64_t i = 0; i < count; i++) {
            const float logit = tamed(row[start + i]);
            x[i] = logit > -INFINITY ? (double)logit - (double)most : -1e9;
        }
        exponentials(x, weights, count);
        for (int64_t i = 0; i < count; i++) {
            s->total += weights[i];
            if (weights[i] >= least)
                s->words[s->count++] = (word){tamed(row[start + i]), (int32_t)(start + i)};
        }
    }
}

static void weigh(survivors *s, double by)
{
    const double most = s->words[0].logit;
    for (int64_t i = 0; i < s->count; i++)
        s->weights[i] = by == 1.0 ? s->words[i].logit - most : (s->words[i].logit - most) / by;
    exponentials(s->weights, s->weights, s->count);
}

static void top_k(const float *row, int64_t n, int64_t k, double least, survivors *s)
{
    if (k <= MOST_HEAP) {
        s->count = first_k(row, n, k, s->words);
    } else {
        s->count = 0;
        for (int64_t i = 0; i < n; i++)
            if (row[i] > -INFINITY)
                s->words[s->count++] = (word){tamed(row[i]), (int32_t)i};
        word *result = sorted(s->words, s->other, s->count);
        s->other = result == s->words ? s->other : s->words;
        s->words = result;
        s->count = s->count < k ? s->count : k;
    }
    if (!s->count)
        return;
    weigh(s, 1.0);
    s->total = 0;
    for (int64_t i = 0; i < s->count; i++)
        s->total += s->weights[i];
    while (s->weights[s->count - 1] < least)
        s->count--;
}

static void whole(const float *row, int64_t n, double least, survivors *s)
{
    const float most = tamed(largest(row, n));
    s->count = 0;
    if (!(most > -INFINITY))
        return;
    above(row, n, most, least, s);
    word *result = sorted(s->words, s->other, s->count);
    s->other = result == s->words ? s->other : s->words;
    s->words = result;
    weigh(s, 1.0);
}

static void top_p(survivors *s, double p)
{
    double sum = 0;
    for (int64_t i = 0; i < s->count; i++) {
        sum += s->weights[i];
        if (sum >= p * s->total) {
            s->count = i + 1;
            return;
        }
    }
}

/* XTC, "exclude top choices": with the given probability, leaves out all words that have at least the threshold's
 * share of the weight, except the least likely of them. */
static void exclude(survivors *s, const params *p)
{
    if (p->xtc_probability <= 0 || p->xtc_threshold > 0.5 || s->count < 2 ||
        uniform(p->seed, (uint64_t)p->index + (1ull << 62)) > p->xtc_probability)
        return;
    double sum = 0;
    int64_t last = 0;
    for (int64_t i = 0; i < s->count; i++)
        sum += s->weights[i];
    while (last + 1 < s->count && s->weights[last + 1] >= p->xtc_threshold * sum)
        last++;
    s->words += last;
    s->count -= last;
}

static int32_t likeliest(const float *row, int64_t n)
{
    const float most = largest(row, n);
    if (!(most > -INFINITY))
        return -1;
    int64_t i = next_block(row, 0, n, nextafterf(most, -INFINITY));
    while (!(row[i] == most))
        i++;
    return (int32_t)i;
}

static int32_t draw(const float *row, int64_t n, const params *p, survivors s)
{
    if (p->temperature == 0)
        return likeliest(row, n);
    const double least = p->min_p > 1e-30 ? p->min_p : 1e-30;
    if (p->top_k > 0 && p->top_k < n)
        top_k(row, n, p->top_k, least, &s);
    else
        whole(row, n, least, &s);
    if (!s.count)
        return -1;
    if (p->top_p < 1)
        top_p(&s, p->top_p);
    exclude(&s, p);
    weigh(&s, p->temperature);
    double sum = 0, reached = 0;
    for (int64_t i = 0; i < s.count; i++)
        sum += s.weights[i];
    const double target = uniform(p->seed, (uint64_t)p->index) * sum;
    for (int64_t i = 0; i < s.count; i++) {
        reached += s.weights[i];
        if (reached > target)
            return s.words[i].id;
    }
    return s.words[s.count - 1].id;
}

/* ── the functions that sampling.py calls ─────────────────────────────────────────────────────────────────────── */

/* How many bytes of scratch memory rows of n words need. */
int64_t aios_sampling_scratch(int64_t n) { return n * (int64_t)(2 * sizeof(word) + sizeof(double)); }

/* Writes tokens[i] for p[i], drawn from row p[i].row; -1 where no word of that row can be drawn. */
void aios_sample(const float *logits, int64_t n, const params *p, int64_t count, int32_t *tokens, char *scratch)
{
    for (int64_t i = 0; i < count; i++) {
        survivors s = {(word *)scratch, (word *)scratch + n, (double *)(scratch + 2 * n * (int64_t)sizeof(word)), 0, 0};
        tokens[i] = draw(logits + p[i].row * n, n, p + i, s);
    }
}
