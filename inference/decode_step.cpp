// A decoding step on a CPU: the next token of each of B rows through the whole model, in fp32
// between the weights. native.py builds and calls it; its ctypes structures repeat those below.
// Letters are model.py's.
//
// All threads walk through the parts of each block together and wait at their ends. Each takes some
// rows of every weight and reads them once for all B activations. The order in which a number is
// summed up depends neither on B nor on the threads: a row is computed as it would be alone.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int ROWS = LANES / 4, TILE = 4;  // weight rows and activations that fill the registers
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef int64_t Size;

enum Kind : Size { FP32, BF16, INT8, INT4 };
struct Matrix {  // (out, in), as weights/quantize.py packs it; bias may be null
    const void *weight, *scales, *least;
    const float *bias;
    Size kind, out, in, groups;
};
struct Block {  // q_norm and k_norm may be null
    const float *input_norm, *post_norm, *q_norm, *k_norm;
    Matrix q, k, v, o, gate, up, down;
};
struct Model {
    const Block *blocks;
    const float *norm;
    Matrix head;
    Size num_blocks, E, H, G, D, inner, window;
    float eps;
};
struct Cache {  // layers: keys of (row, group, position, D); the values lie `values` numbers behind
    void *const *layers;
    Size kind, values, row, group;
};

// Widen LANES numbers to 32 bits. GCC 12 takes many steps where it isn't told the instruction.
template <class T> inline Ints widen(const T *p) {
    Ints out;
#if defined __AVX512F__
    if constexpr (sizeof(T) == 2) out = (Ints)_mm512_cvtepu16_epi32(*(const __m256i_u *)p);
    else if constexpr (std::is_signed<T>()) out = (Ints)_mm512_cvtepi8_epi32(*(const __m128i_u *)p);
    else out = (Ints)_mm512_cvtepu8_epi32(*(const __m128i_u *)p);
#elif defined __AVX2__
    if constexpr (sizeof(T) == 2) out = (Ints)_mm256_cvtepu16_epi32(*(const __m128i_u *)p);
    else if constexpr (std::is_signed<T>()) out = (Ints)_mm256_cvtepi8_epi32(_mm_loadu_si64(p));
    else out = (Ints)_mm256_cvtepu8_epi32(_mm_loadu_si64(p));
#else
    for (int i = 0; i < LANES; i++) out[i] = p[i];
#endif
    return out;
}
inline Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }
inline Floats load(const float *p) { Floats x; memcpy(&x, p, sizeof x); return x; }
inline Floats load(const uint16_t *p) { return (Floats)(widen(p) << 16); }  // bf16
inline Floats load(const int8_t *p) { return to_floats(widen(p)); }
inline float widened(const uint16_t *p) {
    const uint32_t bits = uint32_t(*p) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline void store(float *p, float x) { *p = x; }
inline void store(uint16_t *p, float x) {  // the nearest bf16, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    *p = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline float sum(Floats x) {
    typedef float Four __attribute__((vector_size(16)));
    Four parts[LANES / 4], y = {};
    memcpy(parts, &x, sizeof x);
    for (Four part : parts) y += part;
    return (y[0] + y[2]) + (y[1] + y[3]);
}
// exp(x) by 2^whole * e^rest, to the last bits of a float; loops over it are vectorised.
inline float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 87.0f);
    float whole = std::floor(x * 1.44269504f + 0.5f);
    float r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float y = 1 + r * (1 + r * (0.5f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r / 720)))));
    int32_t bits = (int32_t(whole) + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return y * power;
}

// ROWS rows of a matrix with T activations x (T, in) → out[row][t]. The template's W is the type of
// a weight; Nibbles are int4, whose groups lie side by side, and whose least values multiply the
// sums (T, groups) of x.
struct Nibbles {};
template <class W, int T>
void dot(const Matrix &m, const Size *rows, const float *x, const float *sums, float out[][TILE]) {
    Floats total[ROWS][T] = {};
    if constexpr (std::is_same<W, Nibbles>()) {
        const Size second = m.in / 2;
        const uint8_t *row[ROWS];
        for (int r = 0; r < ROWS; r++) row[r] = (const uint8_t *)m.weight + rows[r] * second;
        for (Size g = 0; g < m.groups; g += LANES) {
            Floats products[ROWS][T] = {};
            for (Size i = g; i < second; i += m.groups) {
                Floats low[ROWS], high[ROWS];
                for (int r = 0; r < ROWS; r++) {
                    const Ints codes = widen(row[r] + i);
                    __builtin_prefetch(row[r] + ROWS * second + i);
                    low[r] = to_floats(codes & 15), high[r] = to_floats(codes >> 4);
                }
                for (int t = 0; t < T; t++) {
                    Floats first = load(x + t * m.in + i), other = load(x + t * m.in + second + i);
                    for (int r = 0; r < ROWS; r++)
                        products[r][t] += low[r] * first, products[r][t] += high[r] * other;
                }
            }
            for (int r = 0; r < ROWS; r++) {
                Floats scale = load((const uint16_t *)m.scales + rows[r] * m.groups + g);
                Floats least = load((const uint16_t *)m.least + rows[r] * m.groups + g);
                for (int t = 0; t < T; t++)
                    total[r][t] += products[r][t] * scale + load(sums + t * m.groups + g) * least;
            }
        }
    } else {
        const W *row[ROWS];
        for (int r = 0; r < ROWS; r++) row[r] = (const W *)m.weight + rows[r] * m.in;
        for (Size i = 0; i < m.in; i += LANES) {
            Floats w[ROWS];
            for (int r = 0; r < ROWS; r++) {
                w[r] = load(row[r] + i);
                __builtin_prefetch(row[r] + ROWS * m.in + i);
            }
            for (int t = 0; t < T; t++) {
                Floats activations = load(x + t * m.in + i);
                for (int r = 0; r < ROWS; r++) total[r][t] += w[r] * activations;
            }
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < T; t++) out[r][t] = sum(total[r][t]);
}

// Rows begin to end of a matrix with B activations x (B, in) → out[b * stride + row], or added to it.
template <class W>
void rows_product(const Matrix &m, Size begin, Size end, const float *x, Size B, float *out,
                  Size stride, bool add = false) {
    std::vector<float> sums(B * m.groups);
    for (Size b = 0; b < B && m.groups; b++)
        for (Size i = 0; i < m.in; i += m.groups)
            for (Size g = 0; g < m.groups; g++) sums[b * m.groups + g] += x[b * m.in + i + g];
    for (Size row = begin; row < end; row += ROWS) {
        Size rows[ROWS];
        for (int r = 0; r < ROWS; r++) rows[r] = std::min(row + r, end - 1);
        for (Size b = 0; b < B; b += TILE) {
            const Size count = std::min<Size>(TILE, B - b);
            auto kernel = count == 1 ? dot<W, 1> : count == 2 ? dot<W, 2> : count == 3 ? dot<W, 3> : dot<W, 4>;
            float products[ROWS][TILE];
            kernel(m, rows, x + b * m.in, sums.data() + b * m.groups, products);
            for (int r = 0; r < ROWS && row + r < end; r++)
                for (int t = 0; t < count; t++) {
                    const float scale = m.kind == INT8 ? ((const float *)m.scales)[row + r] : 1;
                    const float y = products[r][t] * scale + (m.bias ? m.bias[row + r] : 0);
                    float &to = out[(b + t) * stride + row + r];
                    to = add ? to + y : y;
                }
        }
    }
}
void product(const Matrix &m, Size begin, Size end, const float *x, Size B, float *out, Size stride,
             bool add = false) {
    auto run = m.kind == FP32   ? rows_product<float>
               : m.kind == BF16 ? rows_product<uint16_t>
               : m.kind == INT8 ? rows_product<int8_t>
                                : rows_product<Nibbles>;
    run(m, begin, end, x, B, out, stride, add);
}

void rms_norm(const float *x, const float *weight, Size n, float eps, float *out) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (Size i = 0; i < n; i++) squares += x[i] * x[i];
    const float scale = 1 / std::sqrt(squares / n + eps);
    for (Size i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}
void rotate(float *x, const float *cos, const float *sin, Size D) {
    for (Size i = 0, j = D / 2; j < D; i++, j++) {
        const float low = x[i], high = x[j];
        x[i] = low * cos[i] + high * sin[i];
        x[j] = high * cos[j] + low * sin[j];
    }
}

// Attention of the `heads` queries q (heads, D) of a group, which the outcome replaces.
template <class C>
void attend(const C *keys, const C *values, Size seen, Size heads, Size D, float *q, float *probs) {
    const Matrix matrix{keys, nullptr, nullptr, nullptr, 0, seen, D, 0};
    rows_product<C>(matrix, 0, seen, q, heads, probs, seen);
    const float root = std::sqrt(float(D));
    for (Size h = 0; h < heads; h++) {
        float *p = probs + h * seen, largest = *std::max_element(p, p + seen), total = 0;
#pragma omp simd reduction(+ : total)
        for (Size s = 0; s < seen; s++) total += p[s] = exponential((p[s] - largest) / root);
        Floats out[256 / LANES] = {};
        for (Size s = 0; s < seen; s++)
            for (Size d = 0; d < D; d += LANES) out[d / LANES] += p[s] * load(values + s * D + d);
        for (Size d = 0; d < D; d++) q[h * D + d] = out[d / LANES][d % LANES] / total;
    }
}

template <class C>
void run(const Model &m, const Cache &cache, Size B, const Size *positions,
         const float *const *rotations, float *x, float *logits, int num_threads) {
    const Size heads = m.H / m.G, D = m.D, seen = 1 + *std::max_element(positions, positions + B);
    std::vector<float> q(B * m.H * D), gate(B * m.inner), up(B * m.inner);
#pragma omp parallel num_threads(num_threads)
    {
        const Size threads = omp_get_num_threads(), thread = omp_get_thread_num();
        // Where the part of a thread begins among n rows; the next one's is its end
        auto part = [&](Size thread, Size n) { return std::min(n, (n / ROWS + 1) * thread / threads * ROWS); };
        auto each = [&](const Matrix &a, const float *from, float *to, bool add = false) {
            product(a, part(thread, a.out), part(thread + 1, a.out), from, B, to, a.out, add);
        };
        std::vector<float> normed(B * m.E), head(B * D), probs(heads * seen);
        auto norm = [&](const float *weight) {
            for (Size b = 0; b < B; b++)
                rms_norm(x + b * m.E, weight, m.E, m.eps, normed.data() + b * m.E);
        };
        for (Size index = 0; index < m.num_blocks; index++) {
            const Block &block = m.blocks[index];
            C *layer = (C *)cache.layers[index];
            norm(block.input_norm);
            const Size units = m.H + 2 * m.G;  // heads of queries, keys and values
            for (Size unit = units * thread / threads; unit < units * (thread + 1) / threads; unit++) {
                const bool is_q = unit < m.H, is_k = !is_q && unit < m.H + m.G;
                const Size h = is_q ? unit : (unit - m.H) % m.G;
                const Matrix &matrix = is_q ? block.q : is_k ? block.k : block.v;
                const float *weight = is_q ? block.q_norm : is_k ? block.k_norm : nullptr;
                const float *const *angles = rotations + (is_q ? 0 : 2);
                product(matrix, h * D, (h + 1) * D, normed.data(), B, head.data() - h * D, D);
                for (Size b = 0; b < B; b++) {
                    float *y = head.data() + b * D;
                    const Size at = positions[b] * D;
                    if (weight) rms_norm(y, weight, D, m.eps, y);
                    if (is_q || is_k) rotate(y, angles[0] + b * D, angles[1] + b * D, D);
                    C *cached = layer + b * cache.row + h * cache.group + at + (is_k ? 0 : cache.values);
                    for (Size d = 0; d < D; d++) {
                        if (is_q) q[(b * m.H + h) * D + d] = y[d];
                        else store(cached + d, y[d]);
                    }
                }
            }
#pragma omp barrier
            const Size groups = B * m.G;
            for (Size i = groups * thread / threads; i < groups * (thread + 1) / threads; i++) {
                const Size end = positions[i / m.G] + 1, begin = std::max(end - m.window, Size(0));
                const C *keys = layer + i / m.G * cache.row + i % m.G * cache.group + begin * D;
                attend(keys, keys + cache.values, end - begin, heads, D, q.data() + i * heads * D,
                       probs.data());
            }
#pragma omp barrier
            each(block.o, q.data(), x, true);
#pragma omp barrier
            norm(block.post_norm);
            each(block.gate, normed.data(), gate.data());
            each(block.up, normed.data(), up.data());
            for (Size b = 0; b < B; b++)
                for (Size i = part(thread, m.inner); i < part(thread + 1, m.inner); i++) {
                    float &y = gate[b * m.inner + i];
                    y = y / (1 + exponential(-y)) * up[b * m.inner + i];
                }
#pragma omp barrier
            each(block.down, gate.data(), x, true);
#pragma omp barrier
        }
        norm(m.norm);
        each(m.head, normed.data(), logits);
    }
}

template <class To> void unpack_rows(const Matrix &m, void *out, int num_threads) {
    const Size half = m.in / 2;
#pragma omp parallel for num_threads(num_threads)
    for (Size row = 0; row < m.out; row++) {
        To *to = (To *)out + row * m.in;
        if (m.kind == INT8) {
            const float scale = ((const float *)m.scales)[row];
            for (Size i = 0; i < m.in; i++) store(to + i, ((const int8_t *)m.weight)[row * m.in + i] * scale);
            continue;
        }
        std::vector<float> scale(m.groups), least(m.groups);
        for (Size g = 0; g < m.groups; g++) {
            scale[g] = widened((const uint16_t *)m.scales + row * m.groups + g);
            least[g] = widened((const uint16_t *)m.least + row * m.groups + g);
        }
        const uint8_t *codes = (const uint8_t *)m.weight + row * half;
        for (Size i = 0; i < half; i += m.groups)
            for (Size g = 0; g < m.groups; g++) {
                store(to + i + g, (codes[i + g] & 15) * scale[g] + least[g]);
                store(to + half + i + g, (codes[i + g] >> 4) * scale[g] + least[g]);
            }
    }
}

extern "C" {
// Appends to the first B rows of a cache, which hold `positions` tokens; x (B, E) are the embeddings,
// which it overwrites. rotations: the queries' cos and sin (B, D), then the keys'. → logits (B, V)
void decode_step(const Model *model, const Cache *cache, Size B, const Size *positions,
                 const float *const *rotations, float *x, float *logits, int threads) {
    auto step = cache->kind == FP32 ? run<float> : run<uint16_t>;
    step(*model, *cache, B, positions, rotations, x, logits, threads);
}

// Writes an int8 or int4 matrix in fp32 or bf16, for prompts.
void unpack(const Matrix *m, void *out, Size kind, int threads) {
    auto unpack_as = kind == FP32 ? unpack_rows<float> : unpack_rows<uint16_t>;
    unpack_as(*m, out, threads);
}
}
