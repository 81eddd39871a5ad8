/* exp in double, for sampling. */

#define VD (VL / 2)
typedef double vd __attribute__((vector_size(VD * 8)));
typedef int64_t vl __attribute__((vector_size(VD * 8)));
typedef double vdu __attribute__((vector_size(VD * 8), aligned(8), may_alias));

#define LOG2_E 1.4426950408889634074
#define LN2_HIGH 6.93147180369123816490e-01 /* 33 bits: a whole number of them is exact */
#define LN2_LOW 1.90821492927058770002e-10

/* exp of values up to 0, a few ulp; 0 below -708, where it would be subnormal, and for -inf. Products are not fused
   here: the vector extension has no word for it, and every variant rounds twice alike. */
INLINE vd vexp_double(vd x)
{
    static const double factors[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
                                     1.0 / 40320,      1.0 / 5040,      1.0 / 720,      1.0 / 120,     1.0 / 24,
                                     1.0 / 6,          0.5,             1.0,            1.0};
    const vd zero = {0}, magic = zero + 0x1.8p52, t = x * LOG2_E + magic, n = t - magic;
    const vd r = (x - n * LN2_HIGH) - n * LN2_LOW;
    vd p = zero + factors[0];
    for (int i = 1; i < 14; i++)
        p = p * r + factors[i];
    const vl power = ((vl)t - (vl)magic + 1023) << 52;
    return (vd)((vl)(p * (vd)power) & (vl)(x >= -708.0));
}

static void exp_doubles(const double *x, double *y, int64_t n)
{
    for (int64_t i = 0; i + VD <= n; i += VD)
        *(vdu *)(y + i) = (vdu)vexp_double((vd) * (const vdu *)(x + i));
    for (int64_t i = n - n % VD; i < n; i++)
        y[i] = vexp_double((vd){0} + x[i])[0];
}
