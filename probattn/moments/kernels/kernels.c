/* Small determinants and covariances of the past on the vector units of a CPU, in single and in double precision.

   Plain C with the vector types of GCC and Clang, independent of Python: probattn/moments/cpu.py loads the library and
   calls it with a structure of pointers, on the threads that torch uses. Where it was not built, the same is computed
   with torch. tests/faults/kernels_driver.c runs all of it under the address and undefined-behaviour sanitizers. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* One library for all CPUs of an architecture: the loader picks the fastest version that this one can run. It picks before
   a sanitizer has begun, which therefore takes one version. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define EXPORT __attribute__((visibility("default"), target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(_WIN32)
#define EXPORT __attribute__((dllexport))
#else
#define EXPORT __attribute__((visibility("default")))
#endif
#define INLINE static inline __attribute__((always_inline))

#define LARGEST 64 /* largest matrix that determinants() takes */

/* Memory for vectors; Windows has functions of its own for it. */
#ifdef _WIN32
#include <malloc.h>
static void *scratch(size_t bytes) { return _aligned_malloc(bytes ? bytes : 64, 64); }
static void release(void *memory) { _aligned_free(memory); }
/* A name that the linker is asked for in every extension of Python; nobody imports this one. */
EXPORT void *PyInit__compiled(void) { return NULL; }
#else
static void *scratch(size_t bytes) {
    void *memory = NULL;
    return posix_memalign(&memory, 64, bytes ? bytes : 64) ? NULL : memory;
}
static void release(void *memory) { free(memory); }
#endif

/* State shared by the threads that work on one problem; the first member of every structure. */
struct shared {
    long next;   /* first unit of work that no thread has taken */
    long failed; /* whether a thread found no memory */
};

/* Take the next so many units and return the first of them. A thread asks again when it is done, so that none waits long. */
INLINE long taken(struct shared *s, long pieces) { return __atomic_fetch_add(&s->next, pieces, __ATOMIC_RELAXED); }

INLINE void fail(struct shared *s) { __atomic_store_n(&s->failed, 1, __ATOMIC_RELAXED); }

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long most(long a, long b) { return a > b ? a : b; }

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(name) JOIN(name, REAL)

#define REAL float
#define INTEGER int32_t
#define UNSIGNED uint32_t
#define MANTISSA 23
#define ROUNDING 12582912.0f /* 1.5 * 2^23: adding it rounds to an integer, held by the last bits */
#define LN2_HIGH 0.693359375f
#define LN2_LOW -2.12194440054690583e-4f
#define SMALLEST -87.0f
#define DEGREE 7
#include "determinants.inc"
#include "covariance.inc"
#undef REAL
#undef INTEGER
#undef UNSIGNED
#undef MANTISSA
#undef ROUNDING
#undef LN2_HIGH
#undef LN2_LOW
#undef SMALLEST
#undef DEGREE

#define REAL double
#define INTEGER int64_t
#define UNSIGNED uint64_t
#define MANTISSA 52
#define ROUNDING 6755399441055744.0 /* 1.5 * 2^52 */
#define LN2_HIGH 0.693147180369123816490
#define LN2_LOW 1.90821492927058770002e-10
#define SMALLEST -708.0
#define DEGREE 13
#include "determinants.inc"
#include "covariance.inc"

/* Version of what the functions compute, and sizes of the structures. Both must be those of cpu.py: a library of another
   version is not used. */
#define VERSION 2
EXPORT long layout(void) { return 1000000L * VERSION + 1000 * sizeof(problem_float) + sizeof(matrices_float); }
