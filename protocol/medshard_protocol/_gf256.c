/* Matrix multiplication over GF(2^8), polynomial 0x11d: the bulk work of the erasure code, and nothing else.
 *
 * Law: bytes in, bytes out. This file knows no code, no k, no n: encode, decode and repair differ in the matrix alone.
 * matmul() checks every count, length and overlap before a byte is written; the kernels trust it. Tables are static
 * and the working memory is registers, so nothing is allocated while the work goes on, and the GIL is not held.
 *
 * A byte times a constant is linear over GF(2): eight bits in, eight bits out. GFNI does it as one 8x8 bit matrix
 * (Intel SDM, GF2P8AFFINEQB); AVX2 and NEON look up the two nibbles in 16-byte tables (Plank, Greenan, Miller:
 * "Screaming Fast Galois Field Arithmetic Using Intel SIMD Instructions", FAST 2013); portable C adds up doublings.
 */
#if !defined(Py_LIMITED_API) && !defined(Py_GIL_DISABLED)
#define Py_LIMITED_API 0x030B0000 /* 3.11: the first with the buffer protocol in the stable ABI */
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAVE_X86 1
#elif defined(__aarch64__) && defined(__GNUC__)
#include <arm_neon.h>
#define HAVE_NEON 1
#endif

#if defined(__GNUC__)
#define INLINE inline __attribute__((always_inline))
#else
#define INLINE inline
#endif
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define UNROLL _Pragma("GCC unroll 8")
#else
#define UNROLL
#endif

enum {
    polynomial = 0x11d,
    count_max = 255,            /* rows or columns: a code over GF(2^8) has at most 255 cells */
    block_bytes = 64 * 1024,    /* inputs of one block, when they are read once for each group of rows: stays in any L2 */
    block_grain = 512,          /* a block is a multiple of this, so that only the last one has a tail */
    hold_gil_below = 16 * 1024, /* input bytes; a shorter call ends sooner than another thread could take the lock */
};

struct work {
    const uint8_t *matrix; /* rows x cols, row by row */
    int rows, cols, accumulate;
    const uint8_t *const *in;
    uint8_t *const *out;
};

typedef void kernel(const struct work *, size_t from, size_t to);

/* c * x = nibbles[c][x & 15] ^ nibbles[c][16 + (x >> 4)]; affine[c] is the same map as the bit matrix that GFNI takes. */
static uint8_t nibbles[256][32];
static uint64_t affine[256];

static uint8_t twice(uint8_t x)
{
    return (uint8_t)((x << 1) ^ ((x >> 7) * (polynomial & 0xff)));
}

static void fill_tables(void)
{
    for (int c = 0; c < 256; c++) {
        uint8_t power[8]; /* c, 2c, 4c, ... 128c */
        power[0] = (uint8_t)c;
        for (int j = 1; j < 8; j++)
            power[j] = twice(power[j - 1]);
        for (int x = 0; x < 16; x++) {
            uint8_t low = 0, high = 0;
            for (int j = 0; j < 4; j++) {
                low ^= (x >> j & 1) ? power[j] : 0;
                high ^= (x >> j & 1) ? power[j + 4] : 0;
            }
            nibbles[c][x] = low;
            nibbles[c][16 + x] = high;
        }
        affine[c] = 0;
        for (int i = 0; i < 8; i++) /* byte 7-i of the matrix gives bit i of the product */
            for (int j = 0; j < 8; j++)
                affine[c] |= (uint64_t)(power[j] >> i & 1) << (8 * (7 - i) + j);
    }
}

/* ---- portable C: 64-bit words that any compiler turns into whatever vectors its target has ---- */

enum { portable_words = block_grain / 8 };

static void double_words(uint64_t *restrict to, const uint64_t *restrict from)
{
    for (int i = 0; i < portable_words; i++) {
        uint64_t carry = from[i] >> 7 & 0x0101010101010101u;
        uint64_t all = (carry << 8) - carry; /* 0xff in each byte that overflows */
        to[i] = (from[i] << 1 & 0xfefefefefefefefeu) ^ (all & 0x1d1d1d1d1d1d1d1du);
    }
}

static void add_words(uint64_t *restrict to, const uint64_t *restrict from)
{
    for (int i = 0; i < portable_words; i++)
        to[i] ^= from[i];
}

static void portable_kernel(const struct work *w, size_t from, size_t to)
{
    uint64_t power[8][portable_words], sum[portable_words];

    for (size_t at = from; at < to; at += block_grain) {
        size_t bytes = to - at < block_grain ? to - at : block_grain;
        memset(power[0], 0, sizeof power[0]);
        memset(sum, 0, sizeof sum);
        for (int r = 0; r < w->rows && !w->accumulate; r++)
            memset(w->out[r] + at, 0, bytes);
        for (int c = 0; c < w->cols; c++) {
            memcpy(power[0], w->in[c] + at, bytes);
            for (int j = 1; j < 8; j++)
                double_words(power[j], power[j - 1]);
            for (int r = 0; r < w->rows; r++) {
                memcpy(sum, w->out[r] + at, bytes);
                for (int j = 0; j < 8; j++)
                    if (w->matrix[r * w->cols + c] >> j & 1)
                        add_words(sum, power[j]);
                memcpy(w->out[r] + at, sum, bytes);
            }
        }
    }
}

static int always(void) { return 1; }

#ifdef HAVE_X86

/* ---- AVX2: two table look-ups for each byte ---- */

#define FN(x) avx2_##x
#define TARGET __attribute__((target("avx2")))
#define WIDTH 32
#define VECTORS 2
#define ROWS 6

typedef __m256i avx2_vector;
typedef struct { __m256i low, high; } avx2_parts, avx2_factor;

static INLINE TARGET __m256i avx2_zero(void) { return _mm256_setzero_si256(); }
static INLINE TARGET __m256i avx2_load(const uint8_t *from) { return _mm256_loadu_si256((const __m256i *)from); }
static INLINE TARGET void avx2_store(uint8_t *to, __m256i v) { _mm256_storeu_si256((__m256i *)to, v); }

static INLINE TARGET avx2_parts avx2_split(__m256i v)
{
    const __m256i mask = _mm256_set1_epi8(15);
    return (avx2_parts){_mm256_and_si256(v, mask), _mm256_and_si256(_mm256_srli_epi64(v, 4), mask)};
}

static INLINE TARGET avx2_factor avx2_prepare(uint8_t c)
{
    const __m128i *table = (const __m128i *)nibbles[c];
    return (avx2_factor){_mm256_broadcastsi128_si256(_mm_loadu_si128(table)), _mm256_broadcastsi128_si256(_mm_loadu_si128(table + 1))};
}

static INLINE TARGET __m256i avx2_add(__m256i sum, avx2_parts x, avx2_factor f)
{
    __m256i product = _mm256_xor_si256(_mm256_shuffle_epi8(f.low, x.low), _mm256_shuffle_epi8(f.high, x.high));
    return _mm256_xor_si256(sum, product);
}

#include "_gf256_kernel.h"

static int have_avx2(void) { return __builtin_cpu_supports("avx2"); }

/* ---- GFNI on 256-bit vectors ---- */

#define FN(x) gfni256_##x
#define TARGET __attribute__((target("avx2,gfni")))
#define WIDTH 32
#define VECTORS 2
#define ROWS 6

typedef __m256i gfni256_vector, gfni256_parts, gfni256_factor;

static INLINE TARGET __m256i gfni256_zero(void) { return _mm256_setzero_si256(); }
static INLINE TARGET __m256i gfni256_load(const uint8_t *from) { return _mm256_loadu_si256((const __m256i *)from); }
static INLINE TARGET void gfni256_store(uint8_t *to, __m256i v) { _mm256_storeu_si256((__m256i *)to, v); }
static INLINE TARGET __m256i gfni256_split(__m256i v) { return v; }
static INLINE TARGET __m256i gfni256_prepare(uint8_t c) { return _mm256_set1_epi64x((long long)affine[c]); }

static INLINE TARGET __m256i gfni256_add(__m256i sum, __m256i x, __m256i f)
{
    return _mm256_xor_si256(sum, _mm256_gf2p8affine_epi64_epi8(x, f, 0));
}

#include "_gf256_kernel.h"

static int have_gfni256(void) { return __builtin_cpu_supports("gfni") && __builtin_cpu_supports("avx2"); }

/* ---- GFNI on 512-bit vectors ---- */

#define FN(x) gfni512_##x
#define TARGET __attribute__((target("avx512f,avx512bw,gfni")))
#define WIDTH 64
#define VECTORS 3
#define ROWS 8

typedef __m512i gfni512_vector, gfni512_parts, gfni512_factor;

static INLINE TARGET __m512i gfni512_zero(void) { return _mm512_setzero_si512(); }
static INLINE TARGET __m512i gfni512_load(const uint8_t *from) { return _mm512_loadu_si512(from); }
static INLINE TARGET void gfni512_store(uint8_t *to, __m512i v) { _mm512_storeu_si512(to, v); }
static INLINE TARGET __m512i gfni512_split(__m512i v) { return v; }
static INLINE TARGET __m512i gfni512_prepare(uint8_t c) { return _mm512_set1_epi64((long long)affine[c]); }

static INLINE TARGET __m512i gfni512_add(__m512i sum, __m512i x, __m512i f)
{
    return _mm512_xor_si512(sum, _mm512_gf2p8affine_epi64_epi8(x, f, 0));
}

#include "_gf256_kernel.h"

static int have_gfni512(void)
{
    return __builtin_cpu_supports("gfni") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
}

#endif /* HAVE_X86 */

#ifdef HAVE_NEON

/* ---- NEON: as AVX2, on 128-bit vectors; every 64-bit Arm has it ---- */

#define FN(x) neon_##x
#define TARGET
#define WIDTH 16
#define VECTORS 2
#define ROWS 6

typedef uint8x16_t neon_vector;
typedef struct { uint8x16_t low, high; } neon_parts, neon_factor;

static INLINE uint8x16_t neon_zero(void) { return vdupq_n_u8(0); }
static INLINE uint8x16_t neon_load(const uint8_t *from) { return vld1q_u8(from); }
static INLINE void neon_store(uint8_t *to, uint8x16_t v) { vst1q_u8(to, v); }
static INLINE neon_parts neon_split(uint8x16_t v) { return (neon_parts){vandq_u8(v, vdupq_n_u8(15)), vshrq_n_u8(v, 4)}; }
static INLINE neon_factor neon_prepare(uint8_t c) { return (neon_factor){vld1q_u8(nibbles[c]), vld1q_u8(nibbles[c] + 16)}; }

static INLINE uint8x16_t neon_add(uint8x16_t sum, neon_parts x, neon_factor f)
{
    return veorq_u8(sum, veorq_u8(vqtbl1q_u8(f.low, x.low), vqtbl1q_u8(f.high, x.high)));
}

#include "_gf256_kernel.h"

#endif /* HAVE_NEON */

/* ---- dispatch: best first ---- */

static const struct path {
    const char *name;
    kernel *run;
    int rows_at_once;
    int (*available)(void);
} all_paths[] = {
#ifdef HAVE_X86
    {"gfni-avx512", gfni512_kernel, gfni512_rows, have_gfni512},
    {"gfni-avx2", gfni256_kernel, gfni256_rows, have_gfni256},
    {"avx2", avx2_kernel, avx2_rows, have_avx2},
#endif
#ifdef HAVE_NEON
    {"neon", neon_kernel, neon_rows, always},
#endif
    {"portable", portable_kernel, count_max, always},
};

static const struct path *usable[sizeof all_paths / sizeof all_paths[0]];
static int usable_count;

static void find_usable(void)
{
    int count = 0;
#ifdef HAVE_X86
    __builtin_cpu_init();
#endif
    for (size_t i = 0; i < sizeof all_paths / sizeof all_paths[0]; i++)
        if (all_paths[i].available())
            usable[count++] = &all_paths[i];
    usable_count = count;
}

/* Rows go in equal groups that fit the registers. With more than one group, the bytes go in blocks whose inputs stay in cache. */
static void multiply(const struct path *path, const struct work *w, size_t length)
{
    int groups = (w->rows + path->rows_at_once - 1) / path->rows_at_once;
    size_t block = length;

    if (groups > 1) {
        block = block_bytes / (size_t)w->cols / block_grain * block_grain;
        block = block < block_grain ? block_grain : block;
    }
    for (size_t from = 0; from < length; from += block) {
        size_t to = length - from < block ? length : from + block;
        for (int g = 0; g < groups; g++) {
            int first = w->rows * g / groups, end = w->rows * (g + 1) / groups;
            struct work part = *w;
            part.matrix += first * w->cols;
            part.out += first;
            part.rows = end - first;
            path->run(&part, from, to);
        }
    }
}

/* ---- Python's side ---- */

struct call {
    Py_buffer views[2 * count_max]; /* inputs, then outputs */
    int held;
    const uint8_t *in[count_max];
    uint8_t *out[count_max];
};

static void release(struct call *call)
{
    while (call->held > 0)
        PyBuffer_Release(&call->views[--call->held]);
    PyMem_Free(call);
}

/* Take a view of every item; returns their count, or -1 with an exception set. `most` counts are allowed, `least` are needed. */
static int take(struct call *call, PyObject *items, const char *what, int least)
{
    Py_ssize_t count = PySequence_Size(items);

    if (count < 0)
        return -1;
    if (count < least || count > count_max) {
        PyErr_Format(PyExc_ValueError, "%zd %ss: expected %d to %d", count, what, least, count_max);
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PySequence_GetItem(items, i);
        if (item == NULL)
            return -1;
        int failed = PyObject_GetBuffer(item, &call->views[call->held], PyBUF_SIMPLE);
        Py_DECREF(item);
        if (failed) {
            if (PyErr_ExceptionMatches(PyExc_BufferError))
                PyErr_Format(PyExc_ValueError, "%s %zd is not one contiguous buffer", what, i);
            return -1;
        }
        call->held++;
    }
    return (int)count;
}

static int overlap(const Py_buffer *a, const Py_buffer *b)
{
    uintptr_t from_a = (uintptr_t)a->buf, from_b = (uintptr_t)b->buf;
    return a->len > 0 && b->len > 0 && from_a < from_b + (size_t)b->len && from_b < from_a + (size_t)a->len;
}

/* Every view as long as the first; every output writable and apart from all inputs and other outputs. 0, or -1 with ValueError. */
static int check(const struct call *call, int cols, int rows)
{
    Py_ssize_t length = call->views[0].len;

    for (int i = 0; i < cols + rows; i++) {
        const char *what = i < cols ? "input" : "output";
        int index = i < cols ? i : i - cols;
        if (call->views[i].len != length) {
            PyErr_Format(PyExc_ValueError, "%s %d has %zd bytes, input 0 has %zd", what, index, call->views[i].len, length);
            return -1;
        }
        if (i < cols)
            continue;
        if (call->views[i].readonly) {
            PyErr_Format(PyExc_ValueError, "output %d is read-only", index);
            return -1;
        }
        for (int j = 0; j < i; j++) {
            if (overlap(&call->views[i], &call->views[j])) {
                PyErr_Format(PyExc_ValueError, "output %d overlaps %s %d", index, j < cols ? "input" : "output", j < cols ? j : j - cols);
                return -1;
            }
        }
    }
    return 0;
}

static int multiply_call(struct call *call, const char *matrix, Py_ssize_t matrix_bytes, PyObject *inputs, PyObject *outputs,
                         const struct path *path, int accumulate)
{
    int cols = take(call, inputs, "input", 1);
    int rows = cols < 0 ? -1 : take(call, outputs, "output", 0);

    if (rows < 0)
        return -1;
    if (matrix_bytes != (Py_ssize_t)rows * cols) {
        PyErr_Format(PyExc_ValueError, "matrix has %zd bytes, expected %d x %d", matrix_bytes, rows, cols);
        return -1;
    }
    if (check(call, cols, rows))
        return -1;
    for (int c = 0; c < cols; c++)
        call->in[c] = call->views[c].buf;
    for (int r = 0; r < rows; r++)
        call->out[r] = call->views[cols + r].buf;

    struct work work = {(const uint8_t *)matrix, rows, cols, accumulate, call->in, call->out};
    size_t length = (size_t)call->views[0].len;
    if (length < hold_gil_below / (size_t)cols) {
        multiply(path, &work, length);
    } else {
        Py_BEGIN_ALLOW_THREADS
        multiply(path, &work, length);
        Py_END_ALLOW_THREADS
    }
    return 0;
}

static PyObject *gf256_matmul(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"matrix", "inputs", "outputs", "path", "accumulate", NULL};
    PyObject *matrix, *inputs, *outputs;
    int path = -1, accumulate = 0;
    char *matrix_buf;
    Py_ssize_t matrix_bytes;

    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "SOO|ip:matmul", names, &matrix, &inputs, &outputs, &path, &accumulate))
        return NULL;
    if (path < -1 || path >= usable_count)
        return PyErr_Format(PyExc_ValueError, "path %d: this machine has 0 to %d, or -1 for the best", path, usable_count - 1);
    if (PyBytes_AsStringAndSize(matrix, &matrix_buf, &matrix_bytes) < 0)
        return NULL;

    struct call *call = PyMem_Malloc(sizeof *call);
    if (call == NULL)
        return PyErr_NoMemory();
    call->held = 0;
    int failed = multiply_call(call, matrix_buf, matrix_bytes, inputs, outputs, usable[path < 0 ? 0 : path], accumulate);
    release(call);
    if (failed)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *gf256_paths(PyObject *module, PyObject *unused)
{
    PyObject *names = PyTuple_New(usable_count);

    (void)module;
    (void)unused;
    for (int i = 0; names != NULL && i < usable_count; i++) {
        PyObject *name = PyUnicode_FromString(usable[i]->name);
        if (name == NULL || PyTuple_SetItem(names, i, name) < 0)
            Py_CLEAR(names);
    }
    return names;
}

static int gf256_exec(PyObject *module)
{
    (void)module;
    fill_tables();
    find_usable();
    return 0;
}

static PyMethodDef gf256_methods[] = {
    {"matmul", (PyCFunction)(void (*)(void))gf256_matmul, METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("matmul(matrix, inputs, outputs, path=-1, accumulate=False)\n--\n\n"
               "outputs[r] = XOR over c of matrix[r * len(inputs) + c] * inputs[c], over GF(2^8) with polynomial 0x11d.\n"
               "With accumulate, XORed into what the outputs hold. `path` picks from paths(); -1 takes the best.")},
    {"paths", gf256_paths, METH_NOARGS, PyDoc_STR("paths()\n--\n\nNames of the kernels this machine can run, best first.")},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot gf256_slots[] = {
    {Py_mod_exec, (void *)gf256_exec},
#ifdef Py_GIL_DISABLED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef gf256_module = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_gf256",
    .m_doc = PyDoc_STR("Matrix multiplication over GF(2^8). See medshard_protocol.galois."),
    .m_methods = gf256_methods,
    .m_slots = gf256_slots,
};

PyMODINIT_FUNC PyInit__gf256(void)
{
    return PyModuleDef_Init(&gf256_module);
}
