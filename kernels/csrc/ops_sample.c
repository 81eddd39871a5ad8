/* Drivers of sampling. A row is one task: nothing of it is split over threads, and it never sees another. What is done
   to a row, and in which order, is said in kernels/sampling.py. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "ops.h"
#include "pool.h"

#define SMALL_WORK (1 << 14) /* logits not worth waking a worker for */

/* One row's workspace. */
typedef struct {
    double *scores, *weights, *compact; /* [vocabulary] */
    int32_t *ids, *best, *counts;
    uint8_t *kept;
    int64_t vocab;
} Row;

static int64_t row_bytes(int64_t vocab)
{
    return round_up(vocab, 64) * (int64_t)(3 * sizeof(double) + 3 * sizeof(int32_t) + 1);
}

static Row row_in(void *scratch, int64_t vocab)
{
    const int64_t n = round_up(vocab, 64);
    double *at = scratch;
    int32_t *ids = (int32_t *)(at + 3 * n);
    return (Row){at, at + n, at + 2 * n, ids, ids + n, ids + 2 * n, (uint8_t *)(ids + 3 * n), vocab};
}

static int is_finite(const float *x, int64_t n)
{
    int32_t bad = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof(bits));
        bad |= (bits & 0x7F800000) == 0x7F800000;
    }
    return !bad;
}

/* Of two ids the one that stands further back: lower score, or the higher id of equals. */
static int is_worse(const double *scores, int32_t a, int32_t b)
{
    return scores[a] < scores[b] || (scores[a] == scores[b] && a > b);
}

/* The heap's root is the worst of it. */
static void sink(const double *scores, int32_t *heap, int64_t n, int64_t at)
{
    const int32_t id = heap[at];
    for (int64_t child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && is_worse(scores, heap[child + 1], heap[child]))
            child++;
        if (!is_worse(scores, heap[child], id))
            break;
        heap[at] = heap[child];
    }
    heap[at] = id;
}

/* The k best of the ids 0 to n - 1, best first. */
static void take_best(const double *scores, int64_t n, int64_t k, int32_t *best)
{
    for (int64_t i = 0; i < k; i++)
        best[i] = (int32_t)i;
    for (int64_t i = k / 2 - 1; i >= 0; i--)
        sink(scores, best, k, i);
    double least = k > 0 ? scores[best[0]] : 0.0;
    for (int64_t i = k; k > 0 && i < n; i++)
        if (scores[i] > least) { /* of equals the one that came first stays: its id is lower */
            best[0] = (int32_t)i;
            sink(scores, best, k, 0);
            least = scores[best[0]];
        }
    for (int64_t left = k - 1; left > 0; left--) {
        const int32_t worst = best[0];
        best[0] = best[left];
        best[left] = worst;
        sink(scores, best, left, 0);
    }
}

/* Puts the first n of the ids in `from` into `ids`, ascending. */
static void ascending(const Row *r, const int32_t *from, int64_t n, int32_t *ids)
{
    memset(r->kept, 0, r->vocab);
    for (int64_t i = 0; i < n; i++)
        r->kept[from[i]] = 1;
    for (int64_t id = 0, i = 0; i < n; id++)
        if (r->kept[id])
            ids[i++] = (int32_t)id;
}

static void penalise(const Row *r, const Draw *d)
{
    memset(r->counts, 0, r->vocab * sizeof(int32_t));
    for (int64_t i = 0; d->repetition != 1.0 && i < d->num_tokens; i++) {
        double *score = r->scores + d->tokens[i];
        if (!r->counts[d->tokens[i]]++)
            *score = *score > 0.0 ? *score / d->repetition : *score * d->repetition;
    }
    memset(r->counts, 0, r->vocab * sizeof(int32_t));
    for (int64_t i = d->num_prompt; i < d->num_tokens; i++)
        r->counts[d->tokens[i]]++;
    for (int64_t i = d->num_prompt; i < d->num_tokens; i++) {
        const int32_t id = d->tokens[i];
        if (r->counts[id])
            r->scores[id] -= d->frequency * r->counts[id] + d->presence;
        r->counts[id] = 0;
    }
}

static int penalises(const Draw *d) { return d->repetition != 1.0 || d->frequency != 0.0 || d->presence != 0.0; }

static void adjust(const Row *r, const Draw *d)
{
    for (int64_t i = 0; i < d->num_masked; i++)
        r->scores[d->masked[i]] = -INFINITY;
    for (int64_t i = 0; i < d->num_bias; i++)
        r->scores[d->bias_ids[i]] += d->bias[i];
    if (penalises(d))
        penalise(r, d);
}

static int64_t best_id(const Row *r)
{
    double top = r->scores[0];
    int64_t best = 0;
    for (int64_t i = 1; i < r->vocab; i++)
        if (r->scores[i] > top) {
            top = r->scores[i];
            best = i;
        }
    return best;
}

/* The ids that top-k leaves, ascending, and their weights. The maximum becomes 0 before the division, so that a small
   temperature overflows nothing. */
static int64_t keep_top_k(const Row *r, int64_t top_k, double top, double temperature)
{
    const int64_t n = top_k > 0 && top_k < r->vocab ? top_k : r->vocab;
    if (n == r->vocab) {
        for (int64_t i = 0; i < n; i++)
            r->ids[i] = (int32_t)i;
    } else {
        take_best(r->scores, r->vocab, n, r->best);
        ascending(r, r->best, n, r->ids);
    }
    for (int64_t i = 0; i < n; i++)
        r->compact[i] = (r->scores[r->ids[i]] - top) / temperature;
    op_table()->exp_doubles(r->compact, r->compact, n);
    for (int64_t i = 0; i < n; i++)
        r->weights[r->ids[i]] = r->compact[i];
    return n;
}

static int64_t keep_min_p(const Row *r, int64_t n, double min_p)
{
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i++)
        if (r->weights[r->ids[i]] >= min_p)
            r->ids[kept++] = r->ids[i];
    return kept;
}

static double total_weight(const Row *r, int64_t n)
{
    double total = 0.0;
    for (int64_t i = 0; i < n; i++)
        total += r->weights[r->ids[i]];
    return total;
}

static int32_t middle_of(const double *scores, int32_t a, int32_t b, int32_t c)
{
    if (is_worse(scores, a, b)) {
        const int32_t swap = a;
        a = b;
        b = swap;
    }
    return is_worse(scores, b, c) ? (is_worse(scores, a, c) ? a : c) : b;
}

/* The shortest run of best ids whose share reaches top_p: those with less than that before them. Instead of sorting,
   parts the ids at one of them and goes on in the part where the run ends. */
static int64_t keep_top_p(const Row *r, int64_t n, double top_p)
{
    const double needed = top_p * total_weight(r, n);
    double before = 0.0; /* of best[0 .. low), all kept */
    int32_t *best = r->best;
    int64_t low = 0;
    memcpy(best, r->ids, n * sizeof(int32_t));
    for (int64_t high = n; low < high && before < needed;) {
        const int32_t pivot = middle_of(r->scores, best[low], best[low + (high - low) / 2], best[high - 1]);
        double better = 0.0;
        int64_t at = low;
        for (int64_t i = low; i < high; i++) {
            const int32_t id = best[i];
            if (!is_worse(r->scores, pivot, id))
                continue;
            better += r->weights[id];
            best[i] = best[at];
            best[at++] = id;
        }
        if (before + better >= needed) {
            high = at;
            continue;
        }
        for (int64_t i = at; i < high; i++)
            if (best[i] == pivot)
                best[i] = best[at];
        best[at] = pivot;
        before += better + r->weights[pivot];
        low = at + 1;
    }
    ascending(r, best, low, r->ids);
    return low;
}

/* The inverse of the cumulative distribution over the first n ids, in their order. */
static int64_t draw(const Row *r, int64_t n, double u)
{
    const double target = u * total_weight(r, n); /* with 53 bits of u less than the total */
    double cumulative = 0.0;
    for (int64_t i = 0; i < n; i++) {
        cumulative += r->weights[r->ids[i]];
        if (cumulative > target)
            return r->ids[i];
    }
    return r->ids[n - 1];
}

static int64_t sample_row(const Row *r, const float *logits, const Draw *d)
{
    if (!is_finite(logits, r->vocab))
        return NOT_FINITE;
    if (d->temperature == 0.0 && d->num_masked == 0 && d->num_bias == 0 && !penalises(d))
        return op_table()->argmax(logits, r->vocab);
    for (int64_t i = 0; i < r->vocab; i++)
        r->scores[i] = logits[i];
    adjust(r, d);
    const int64_t best = best_id(r);
    const double top = r->scores[best];
    if (!(fabs(top) <= DBL_MAX))
        return NO_TOKEN;
    if (d->temperature == 0.0)
        return best;
    int64_t n = keep_top_k(r, d->top_k, top, d->temperature);
    if (d->min_p > 0.0)
        n = keep_min_p(r, n, d->min_p);
    if (d->top_p < 1.0)
        n = keep_top_p(r, n, d->top_p);
    return draw(r, n, d->random);
}

typedef struct {
    const float *logits;
    const Draw *draws;
    int64_t *tokens;
    int64_t vocab;
} Sampling;

static void sample_task(const void *argument, int64_t row, void *scratch)
{
    const Sampling *s = argument;
    const Row r = row_in(scratch, s->vocab);
    s->tokens[row] = sample_row(&r, s->logits + row * s->vocab, s->draws + row);
}

static int all_below(const int32_t *ids, int64_t n, int64_t limit)
{
    int32_t bad = 0;
    for (int64_t i = 0; i < n; i++)
        bad |= ids[i] < 0 || ids[i] >= limit;
    return !bad;
}

const char *op_sample(const float *logits, const Draw *draws, int64_t *tokens, int64_t num_rows, int64_t vocab)
{
    for (int64_t i = 0; i < num_rows; i++) {
        const Draw *d = draws + i;
        if (!all_below(d->tokens, d->num_tokens, vocab) || !all_below(d->masked, d->num_masked, vocab) ||
            !all_below(d->bias_ids, d->num_bias, vocab))
            return "a token of the history, a masked or a biased one lies outside the vocabulary";
    }
    if (pool_reserve(row_bytes(vocab)) != 0)
        return out_of_memory;
    const Sampling s = {logits, draws, tokens, vocab};
    pool_run(sample_task, &s, num_rows, num_rows * vocab <= SMALL_WORK);
    return NULL;
}

static void score_task(const void *argument, int64_t row, void *scratch)
{
    const Scoring *s = argument;
    const Row r = row_in(scratch, s->vocab);
    float *logprobs = (float *)r.compact;
    const int64_t most = s->most_top, k = s->num_top[row] < s->vocab ? s->num_top[row] : s->vocab;
    int64_t better = 0;
    s->logprob[row] = NAN;
    if (!is_finite(s->logits + row * s->vocab, s->vocab))
        return;
    op_table()->log_softmax(s->logits + row * s->vocab, logprobs, s->vocab);
    const float mine = logprobs[s->tokens[row]];
    for (int64_t i = 0; i < s->vocab; i++) {
        better += logprobs[i] > mine;
        r.scores[i] = logprobs[i];
    }
    take_best(r.scores, s->vocab, k, r.best);
    for (int64_t i = 0; i < k; i++) {
        s->top_ids[row * most + i] = r.best[i];
        s->top_logprobs[row * most + i] = logprobs[r.best[i]];
    }
    s->logprob[row] = mine;
    s->rank[row] = 1 + better;
}

const char *op_score(const Scoring *s, int64_t num_rows)
{
    for (int64_t i = 0; i < num_rows; i++) {
        if (s->tokens[i] < 0 || s->tokens[i] >= s->vocab)
            return "a token to be scored lies outside the vocabulary";
        if (s->num_top[i] < 0 || s->num_top[i] > s->most_top)
            return "more best tokens are asked for than there is room";
    }
    if (pool_reserve(row_bytes(s->vocab)) != 0)
        return out_of_memory;
    pool_run(score_task, s, num_rows, num_rows * s->vocab <= SMALL_WORK);
    return NULL;
}
