/* The gate of DeepSeek-V2 (arXiv 2405.04434, section 2.1.3) and DeepSeek-V3 (arXiv 2412.19437, section 2.1.2). */

/* Index of the largest value not yet taken, the lowest of equals; always a valid index, also among NaN and -inf. */
static int64_t take_best(const float *values, int64_t n, float *taken)
{
    int64_t best = -1;
    for (int64_t i = 0; i < n; i++)
        if (taken[i] == 0.0f && (best < 0 || values[i] > values[best]))
            best = i;
    taken[best] = 1.0f;
    return best;
}

static void scores_of(const Route *r, const float *logits, float *scores)
{
    const int64_t n = r->num_experts;
    float buffer[16], out[16];
    const float top = r->softmax ? row_max(logits, n) : 0.0f, total = r->softmax ? sum_exp(logits, n, top) : 1.0f;
    for (int64_t i = 0; i < n; i += 16) {
        const float *p = padded16(logits + i, n - i, 0.0f, buffer);
        for (int s = 0; s < NUM_STRIPS; s++) {
            vf x = load(p + s * VL);
            vf score = r->softmax ? vexp(x - splat(top)) / splat(total) : splat(1.0f) / (splat(1.0f) + vexp(-x));
            store(out + s * VL, score);
        }
        memcpy(scores + i, out, (n - i < 16 ? n - i : 16) * sizeof(float));
    }
}

static float group_score(const Route *r, const float *choice, int64_t size)
{
    float first = -INFINITY, second = -INFINITY;
    for (int64_t i = 0; i < size; i++) {
        if (choice[i] > first) {
            second = first;
            first = choice[i];
        } else if (choice[i] > second) {
            second = choice[i];
        }
    }
    return r->method == METHOD_NOAUX_TC && size > 1 ? first + second : first;
}

static void mask_groups(const Route *r, float *choice, float *groups, float *taken)
{
    const int64_t size = r->num_experts / r->num_groups;
    const float masked = r->method == METHOD_NOAUX_TC ? -INFINITY : 0.0f;
    for (int64_t g = 0; g < r->num_groups; g++) {
        groups[g] = group_score(r, choice + g * size, size);
        taken[g] = 0.0f;
    }
    for (int64_t i = 0; i < r->topk_groups; i++)
        take_best(groups, r->num_groups, taken);
    for (int64_t g = 0; g < r->num_groups; g++)
        for (int64_t i = 0; i < size && taken[g] == 0.0f; i++)
            choice[g * size + i] = masked;
}

static void route(const Route *r, int64_t row, float *scratch)
{
    const int64_t n = r->num_experts, width = round_up(n, 16);
    float *scores = scratch, *choice = scores + width, *groups = choice + width, *taken = groups + width;
    float *weights = r->weights + row * r->top_k, total = 0.0f;
    scores_of(r, r->logits + row * n, scores);
    for (int64_t i = 0; i < n; i++)
        choice[i] = r->bias ? scores[i] + r->bias[i] : scores[i];
    if (r->method != METHOD_GREEDY && r->num_groups > 1)
        mask_groups(r, choice, groups, taken);
    /* group_limited_greedy gives a masked expert that is chosen nevertheless its masked score, 0. */
    const float *source = r->method == METHOD_GROUP_LIMITED_GREEDY ? choice : scores;
    memset(taken, 0, n * sizeof(float));
    for (int64_t k = 0; k < r->top_k; k++) {
        int64_t expert = take_best(choice, n, taken);
        r->ids[row * r->top_k + k] = (int32_t)expert;
        weights[k] = source[expert];
        total += weights[k];
    }
    for (int64_t k = 0; k < r->top_k; k++)
        weights[k] = (r->normalize ? weights[k] / (total + 1e-20f) : weights[k]) * r->scale;
}
