/* The order in which a micro-batch's slots travel: by rank, then by position. */
#include <stdio.h>
#include <string.h>

#include "ops.h"
#include "pool.h"

typedef struct {
    const int32_t *ids, *rank_of;
    int64_t num_slots, top_k, num_experts, num_ranks;
} Choice;

static const char *check_choice(const Choice *c)
{
    static _Thread_local char wrong[96];
    for (int64_t i = 0; i < c->num_slots; i++) {
        const int32_t expert = c->ids[i];
        if (expert < 0 || expert >= c->num_experts) {
            snprintf(wrong, sizeof wrong, "expert %d is outside 0 to %lld: router and placement disagree", expert,
                     (long long)c->num_experts - 1);
            return wrong;
        }
        if (c->rank_of[expert] < 0 || c->rank_of[expert] >= c->num_ranks) {
            snprintf(wrong, sizeof wrong, "rank %d is outside 0 to %lld: router and placement disagree",
                     c->rank_of[expert], (long long)c->num_ranks - 1);
            return wrong;
        }
    }
    return NULL;
}

/* How many slots and distinct tokens each rank has, and where its first ones go. last: [num_ranks] scratch. */
static void count_ranks(const Choice *c, int32_t *slots, int32_t *rows, int32_t *last)
{
    memset(slots, 0, c->num_ranks * sizeof(int32_t));
    memset(rows, 0, c->num_ranks * sizeof(int32_t));
    for (int64_t r = 0; r < c->num_ranks; r++)
        last[r] = -1;
    for (int64_t i = 0; i < c->num_slots; i++) {
        const int32_t rank = c->rank_of[c->ids[i]], token = (int32_t)(i / c->top_k);
        slots[rank]++;
        rows[rank] += last[rank] != token;
        last[rank] = token;
    }
}

const char *op_plan_slots(const int32_t *ids, int64_t num_tokens, int64_t top_k, const int32_t *rank_of,
                          int64_t num_experts, int64_t num_ranks, int32_t *plan, int32_t *counts)
{
    const Choice c = {ids, rank_of, num_tokens * top_k, top_k, num_experts, num_ranks};
    const int64_t n = c.num_slots;
    int32_t *last = pool_buffer(0, 4 * num_ranks * (int64_t)sizeof(int32_t));
    const char *wrong = last ? check_choice(&c) : out_of_memory;
    if (wrong)
        return wrong;
    int32_t *next = last + num_ranks, *first_row = next + num_ranks, *row = first_row + num_ranks;
    count_ranks(&c, counts, counts + num_ranks, last);
    for (int64_t r = 0; r < num_ranks; r++) {
        next[r] = r ? next[r - 1] + counts[r - 1] : 0;
        first_row[r] = r ? first_row[r - 1] + counts[num_ranks + r - 1] : 0;
        row[r] = last[r] = -1;
    }
    for (int64_t i = 0; i < n; i++) {
        const int32_t rank = rank_of[ids[i]], token = (int32_t)(i / top_k), place = next[rank]++;
        if (last[rank] != token)
            plan[first_row[rank] + ++row[rank]] = last[rank] = token;
        plan[n + place] = row[rank];
        plan[2 * n + place] = ids[i];
        plan[3 * n + place] = (int32_t)i;
        plan[4 * n + i] = place;
    }
    return NULL;
}
