/* Random problems for every kernel, for a build with sanitizers: each array is an allocation of its own and exactly as
   long as the kernels are told, so that a read or a write past an end is seen. Two threads share every problem.

       driver SEED PROBLEMS [overrun | shift]

   prints the number of problems. The last word is a control: arrays one token shorter than the kernels are told, or a
   shift by a negative number. */

#include "kernels.c"

#include <pthread.h>
#include <stdio.h>

static uint64_t state;

static uint64_t next(void) { /* splitmix64 */
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static long below(long n) { return (long)(next() % (uint64_t)n); }
static double uniform(void) { return (double)(next() >> 11) / 9007199254740992.0; }

/* Mostly small dimensions, now and then every one up to the largest. */
static long dimension(long largest) { return 1 + below(below(4) ? least(8, largest) : largest); }

static double number(int kind) {
    const double x = 2 * uniform() - 1;
    if (kind == 1) return 1e3 * x;
    if (kind == 2 && !below(40)) return INFINITY;
    if (kind == 3 && !below(40)) return NAN;
    if (kind == 4) return ldexp(x, (int)below(240) - 120);
    if (kind == 5) return (double)below(2);
    return x;
}

#define NUMBERS(REAL)                                        \
    static REAL *numbers_##REAL(long count, int kind) {      \
        REAL *made = malloc(most(1, count) * sizeof(REAL));  \
        for (long i = 0; i < count; i++) made[i] = (REAL)number(kind); \
        return made;                                         \
    }
NUMBERS(float)
NUMBERS(double)

struct job {
    void (*kernel)(void *);
    void *problem;
};

static void *work(void *job) {
    ((struct job *)job)->kernel(((struct job *)job)->problem);
    return NULL;
}

static void on_two_threads(void (*kernel)(void *), void *problem) {
    struct job job = {kernel, problem};
    pthread_t other;
    const int started = !below(2) && !pthread_create(&other, NULL, work, &job);
    kernel(problem);
    if (started) pthread_join(other, NULL);
}

#define PROBLEM(REAL)                                                                                                     \
    static void covariances_##REAL(long missing) {                                                                        \
        const int kind = (int)below(6);                                                                                   \
        const long positions = 1 + below(below(3) ? 12 : 150), group = 1 + below(3), heads = 1 + below(3);                \
        const long tokens = 1 + below(below(3) ? 40 : 300), rows = positions * group;                                     \
        const long rank = dimension(64), value = dimension(rank > 16 ? 16 : 64), area = rank * value;                     \
        const long pieces = 1 + below(least(rows, 4)), there = tokens - missing;                                          \
        int64_t *first = malloc(positions * sizeof(int64_t)), *limit = malloc(positions * sizeof(int64_t));               \
        for (long i = 0; i < positions; i++) { /* limits do not decrease; some lie outside, some rows see nothing */      \
            limit[i] = most(i ? limit[i - 1] : 0, (i + 1) * (tokens + 2) / positions - below(3));                         \
            first[i] = below(3) ? 0 : below(tokens + 3) - 1;                                                              \
        }                                                                                                                 \
        problem_##REAL h = {{0, 0}, heads, pieces, rows, group, tokens, rank, value};                                     \
        REAL *q = numbers_##REAL(heads * rows * rank, kind), *k = numbers_##REAL(heads * there * rank, kind);             \
        REAL *v = numbers_##REAL(heads * there * value, kind), *c = numbers_##REAL(heads * rows * area, kind);            \
        REAL *mean = numbers_##REAL(heads * rows * (rank + value), 0), *log_sum = numbers_##REAL(heads * rows, 0);        \
        h.q = q, h.k = k, h.v = v, h.first = first, h.limit = limit, h.scale = uniform();                                 \
        h.c = c, h.mean = mean, h.log_sum = log_sum;                                                                      \
        on_two_threads(covariance_##REAL, &h);                                                                            \
        h.shared.next = 0;                                                                                                \
        if (!below(2)) h.mean = NULL;                                                                                     \
        if (!below(2)) h.log_sum = NULL;                                                                                  \
        h.to_query = numbers_##REAL(heads * rows * rank, 0);                                                              \
        h.to_key = numbers_##REAL(pieces * heads * tokens * rank, 0);                                                     \
        h.to_value = numbers_##REAL(pieces * heads * tokens * value, 0);                                                  \
        on_two_threads(covariance_backward_##REAL, &h);                                                                   \
        void *all[] = {first, limit, q, k, v, c, mean, log_sum, h.to_query, h.to_key, h.to_value};                        \
        for (int i = 0; i < 11; i++) free(all[i]);                                                                        \
    }                                                                                                                     \
    static void eliminations_##REAL(void) {                                                                               \
        const long count = below(40), size = dimension(LARGEST);                                                          \
        REAL *k = numbers_##REAL(count * size * size, (int)below(6)), *inverse = numbers_##REAL(count * size * size, 0);  \
        REAL *sign = numbers_##REAL(count, 0), *logabs = numbers_##REAL(count, 0);                                        \
        matrices_##REAL m = {{0, 0}, count, size, k, sign, logabs, inverse};                                              \
        on_two_threads(determinants_##REAL, &m);                                                                          \
        free(k), free(inverse), free(sign), free(logabs);                                                                 \
    }
PROBLEM(float)
PROBLEM(double)

int main(int count, char **words) {
    if (count < 3) return 2;
    state = strtoull(words[1], NULL, 10);
    const long problems = strtol(words[2], NULL, 10);
    const int overrun = count > 3 && !strcmp(words[3], "overrun");
    volatile int places = count > 3 && !strcmp(words[3], "shift") ? -1 : 0;
    for (long i = 0; i < problems; i++) {
        if (1 << places < 0) return 2;
        switch (below(4)) {
        case 0: covariances_float(overrun); break;
        case 1: covariances_double(overrun); break;
        case 2: eliminations_float(); break;
        default: eliminations_double();
        }
    }
    printf("%ld\n", problems);
    return 0;
}
