// A decoding step on a CPU: the next token of each of B rows through the whole model, in fp32
// between the weights. native.py builds and calls it, and repeats its structures. Letters are
// model.py's.
//
// All threads walk through the parts of each block together. A thread takes some rows of every
// weight and reads them once for all B activations. No order of summation depends on B or on the
// threads: a row is computed as it would be alone.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#include <omp.h>

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int ROWS = LANES / 4, TILE = 4;  // rows of a weight and activations: they fill registers
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
#if defined __AVX512F__
    if constexpr (sizeof(T) == 2) return (Ints)_mm512_cvtepu16_epi32(*(const __m256i_u *)p);
    const __m128i bytes = _mm_loadu_si128((const __m128i_u *)p);
    return (Ints)(std::is_signed<T>() ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif defined __AVX2__
    if constexpr (sizeof(T) == 2) return (Ints)_mm256_cvtepu16_epi32(*(const __m128i_u *)p);
    const __m128i bytes = _mm_loadu_si64(p);
    return (Ints)(std::is_signed<T>() ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#else
    Ints out;
    for (int i = 0; i < LANES; i++) out[i] = p[i];
    return out;
#endif
}
inline Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }
inline Floats load(const float *p) { Floats x; memcpy(&x, p, sizeof x); return x; }
inline Floats load(const uint16_t *p) { return (Floats)(widen(p) << 16); }  // bf16
inline Floats load(const int8_t *p) { return to_floats(widen(p)); }
inline void store(float *p, Floats x) { memcpy(p, &x, sizeof x); }
inline void store(uint16_t *p, Floats x) {  // the nearest bf16, ties to even
    const Ints bits = (Ints)x, rounded = bits + 0x7fff + (bits >> 16 & 1);
    for (int i = 0; i < LANES; i++) p[i] = uint32_t(rounded[i]) >> 16;
}
inline float sum(Floats x) {
    typedef float Four __attribute__((vector_size(16)));
    Four parts[LANES / 4], y = {};
    memcpy(parts, &x, sizeof x);
    for (Four part : parts) y += part;
    return (y[0] + y[2]) + (y[1] + y[3]);
}
// e^x as 2^whole e^rest, to the last bits of a float. Unlike std::exp it is vectorised.
inline float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 87.0f);
    const float whole = std::floor(x * 1.44269504f + 0.5f);
    const float r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    const float tail = 1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r / 720));
    const float y = 1 + r * (1 + r * (0.5f + r * tail));
    const int32_t bits = (int32_t(whole) + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof bits);
    return y * power;
}

// The products of ROWS rows of a weight with T activations x (T, in) → out[row][t]. W: its type.
// int4 codes lie in rows of groups; their least values multiply the sums (T, groups) of x.
struct Nibbles {};
template <class W, int T>
void dot(const Matrix &m, const Size *rows, const float *x, const float *sums, float out[][TILE]) {
    Floats total[ROWS][T] = {};
    if constexpr (std::is_same<W, Nibbles>()) {
        const Size half = m.in / 2;
        const uint8_t *row[ROWS];
        for (int r = 0; r < ROWS; r++) row[r] = (const uint8_t *)m.weight + rows[r] * half;
        for (Size g = 0; g < m.groups; g += LANES) {
            Floats products[ROWS][T] = {};
            for (Size i = g; i < half; i += m.groups) {
                Floats low[ROWS], high[ROWS];
                for (int r = 0; r < ROWS; r++) {
                    const Ints codes = widen(row[r] + i);
                    low[r] = to_floats(codes & 15), high[r] = to_floats(codes >> 4);
                    __builtin_prefetch(row[r] + i + ROWS * half);
                }
                for (int t = 0; t < T; t++) {
                    const float *at = x + t * m.in + i;
                    const Floats first = load(at), second = load(at + half);
                    for (int r = 0; r < ROWS; r++) products[r][t] += low[r] * first;
                    for (int r = 0; r < ROWS; r++) products[r][t] += high[r] * second;
                }
            }
            for (int r = 0; r < ROWS; r++) {
                const Floats scale = load((const uint16_t *)m.scales + rows[r] * m.groups + g);
                const Floats least = load((const uint16_t *)m.least + rows[r] * m.groups + g);
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
                __builtin_prefetch(row[r] + i + ROWS * m.in);
            }
            for (int t = 0; t < T; t++)
                for (int r = 0; r < ROWS; r++) total[r][t] += w[r] * load(x + t * m.in + i);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < T; t++) out[r][t] = sum(total[r][t]);
}

// Rows begin to end of a weight with B activations x (B, in) → out (B, stride), or added to it.
template <class W>
void product(const Matrix &m, Size begin, Size end, const float *x, Size B, float *out, Size stride,
             bool add) {
    std::vector<float> sums(B * m.groups);
    for (Size b = 0; b < B && m.groups; b++)
        for (Size i = 0; i < m.in; i += m.groups)
            for (Size g = 0; g < m.groups; g++) sums[b * m.groups + g] += x[b * m.in + i + g];
    for (Size row = begin; row < end; row += ROWS) {
        Size rows[ROWS];
        for (int r = 0; r < ROWS; r++) rows[r] = std::min(row + r, end - 1);
        for (Size b = 0, count; b < B; b += count) {
            count = B - b >= TILE ? TILE : B - b >= 2 ? 2 : 1;
            auto kernel = count == TILE ? dot<W, TILE> : count == 2 ? dot<W, 2> : dot<W, 1>;
            float products[ROWS][TILE];
            kernel(m, rows, x + b * m.in, sums.data() + b * m.groups, products);
            for (Size r = row; r < std::min(row + ROWS, end); r++)
                for (Size t = 0; t < count; t++) {
                    float y = products[r - row][t], &to = out[(b + t) * stride + r];
                    if (m.kind == INT8) y *= ((const float *)m.scales)[r];
                    if (m.bias) y += m.bias[r];
                    to = add ? to + y : y;
                }
        }
    }
}

void rms_norm(const float *x, const float *weight, Size n, float eps, float *out) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (Size i = 0; i < n; i++) squares += x[i] * x[i];
    const float scale = 1 / std::sqrt(squares / n + eps);
    for (Size i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

// Norm (if there is a weight) and rotation of a head x (D,) by the cos and sin `at` some place.
void turn(float *x, const float *weight, const float *const *angles, Size at, Size D, float eps) {
    const float *cos = angles[0] + at, *sin = angles[1] + at;
    if (weight) rms_norm(x, weight, D, eps, x);
    for (Size i = 0, j = D / 2; j < D; i++, j++) {
        const float low = x[i], high = x[j];
        x[i] = low * cos[i] + high * sin[i];
        x[j] = high * cos[j] + low * sin[j];
    }
}

// Attention of the `heads` queries q (heads, D) of a group, which the outcome replaces.
template <class C>
void attend(const C *keys, const C *values, Size seen, Size heads, Size D, float *q, float *probs) {
    const Matrix matrix{keys, nullptr, nullptr, nullptr, FP32, seen, D, 0};
    product<C>(matrix, 0, seen, q, heads, probs, seen, false);
    const float root = std::sqrt(float(D));
    for (Size h = 0; h < heads; h++) {
        float *p = probs + h * seen, largest = *std::max_element(p, p + seen), total = 0;
#pragma omp simd reduction(+ : total)
        for (Size s = 0; s < seen; s++) total += p[s] = exponential((p[s] - largest) / root);
        Floats out[256 / LANES] = {};
        for (Size s = 0; s < seen; s++)
            for (Size d = 0; d < D; d += LANES) out[d / LANES] += p[s] * load(values + s * D + d);
        for (Size d = 0; d < D; d += LANES) store(q + h * D + d, out[d / LANES] / total);
    }
}

template <class C>
void run(const Model &m, const Cache &cache, Size B, const Size *positions,
         const float *const *angles, float *x, float *logits, int num_threads) {
    const Size D = m.D, heads = m.H / m.G;
    const Size longest = *std::max_element(positions, positions + B) + 1;
    std::vector<float> q(B * m.H * D), k(B * m.G * D), v(k), gate(B * m.inner), up(gate);
#pragma omp parallel num_threads(num_threads)
    {
        const Size threads = omp_get_num_threads(), thread = omp_get_thread_num();
        auto bound = [&](Size n, Size t) { return (n + ROWS - 1) / ROWS * t / threads * ROWS; };
        auto first = [&](Size n) { return std::min(n, bound(n, thread)); };
        auto last = [&](Size n) { return std::min(n, bound(n, thread + 1)); };
        auto multiply = [&](const Matrix &a, const float *from, float *to, bool add = false) {
            auto run = a.kind == FP32 ? product<float> : a.kind == BF16 ? product<uint16_t>
                     : a.kind == INT8 ? product<int8_t> : product<Nibbles>;
            run(a, first(a.out), last(a.out), from, B, to, a.out, add);
        };
        std::vector<float> normed(B * m.E), probs(heads * longest);
        auto norm = [&](const float *weight) {
            for (Size i = 0; i < B * m.E; i += m.E) rms_norm(x + i, weight, m.E, m.eps, &normed[i]);
            return normed.data();
        };
        for (Size index = 0; index < m.num_blocks; index++) {
            const Block &block = m.blocks[index];
            const float *input = norm(block.input_norm);
            multiply(block.q, input, q.data());
            multiply(block.k, input, k.data());
            multiply(block.v, input, v.data());
#pragma omp barrier
            for (Size i = B * m.G * thread / threads; i < B * m.G * (thread + 1) / threads; i++) {
                const Size b = i / m.G, end = positions[b] + 1;
                const Size begin = std::max(end - m.window, Size(0));
                C *keys = (C *)cache.layers[index] + b * cache.row + i % m.G * cache.group;
                float *const queries = &q[i * heads * D], *key = &k[i * D];
                for (Size h = 0; h < heads; h++)
                    turn(queries + h * D, block.q_norm, angles, b * D, D, m.eps);
                turn(key, block.k_norm, angles + 2, b * D, D, m.eps);
                for (Size d = 0; d < D; d += LANES) {
                    store(keys + positions[b] * D + d, load(key + d));
                    store(keys + positions[b] * D + d + cache.values, load(&v[i * D + d]));
                }
                keys += begin * D;
                attend(keys, keys + cache.values, end - begin, heads, D, queries, probs.data());
            }
#pragma omp barrier
            multiply(block.o, q.data(), x, true);
#pragma omp barrier
            input = norm(block.post_norm);
            multiply(block.gate, input, gate.data());
            multiply(block.up, input, up.data());
            for (Size b = 0; b < B; b++) {
                float *y = &gate[b * m.inner];
#pragma omp simd
                for (Size i = first(m.inner); i < last(m.inner); i++)
                    y[i] = y[i] / (1 + exponential(-y[i])) * up[b * m.inner + i];
            }
#pragma omp barrier
            multiply(block.down, gate.data(), x, true);
#pragma omp barrier
        }
        multiply(m.head, norm(m.norm), logits);
    }
}

template <class To> void unpack_as(const Matrix &m, To *out, int num_threads) {
    const Size half = m.in / 2;
#pragma omp parallel for num_threads(num_threads)
    for (Size row = 0; row < m.out; row++) {
        To *to = out + row * m.in;
        const uint8_t *codes = (const uint8_t *)m.weight + row * (m.kind == INT8 ? m.in : half);
        for (Size i = 0; i < m.in && m.kind == INT8; i += LANES)
            store(to + i, load((const int8_t *)codes + i) * ((const float *)m.scales)[row]);
        for (Size g = 0; g < m.groups; g += LANES) {
            const Floats scale = load((const uint16_t *)m.scales + row * m.groups + g);
            const Floats least = load((const uint16_t *)m.least + row * m.groups + g);
            for (Size i = g; i < half; i += m.groups) {
                store(to + i, to_floats(widen(codes + i) & 15) * scale + least);
                store(to + i + half, to_floats(widen(codes + i) >> 4) * scale + least);
            }
        }
    }
}

extern "C" {
// Appends to the first B rows of a cache, which hold `positions` tokens. x (B, E): the embeddings,
// which it overwrites. angles: the queries' cos and sin (B, D), then the keys'. → logits (B, V)
void decode_step(const Model *model, const Cache *cache, Size B, const Size *positions,
                 const float *const *angles, float *x, float *logits, int threads) {
    auto step = cache->kind == FP32 ? run<float> : run<uint16_t>;
    step(*model, *cache, B, positions, angles, x, logits, threads);
}

// Writes an int8 or int4 weight in fp32 or bf16, for prompts.
void unpack(const Matrix *m, void *out, Size kind, int threads) {
    if (kind == FP32) unpack_as(*m, (float *)out, threads);
    else unpack_as(*m, (uint16_t *)out, threads);
}
}
