// A decoding step on a CPU: the next token of each of B rows through the whole model, in fp32
// between the weights. native.py builds and calls it, and fills its structures. Letters are
// model.py's.
//
// Every thread runs all of it; loops marked `omp for` are shared, and at their ends the threads
// wait for each other. A thread takes some rows of every weight and reads them once for all B
// activations. No order of summation depends on B or on the threads: a row is computed as it would
// be alone.
#include "../fused.cpp"
#include <algorithm>
#include <utility>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef __AVX512BW__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int ROWS = LANES / 4, TILE = 4;  // rows of a weight and activations: they fill registers
constexpr int AHEAD = 2048;  // bytes that are fetched before they are needed
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef int64_t Size;

enum Kind : Size { FP32, BF16, INT8, INT4 };
struct Matrix {  // (out, in), as weights/quantize.py packs it; bias may be null
    const void *weight;
    Size out, in, kind, groups;
    const float *bias;
    const BFloat16 *scales, *least;  // int8's scales are fp32
};
struct Block {  // q_norm and k_norm may be null
    const float *input_norm, *post_norm, *q_norm, *k_norm;
    Matrix q, k, v, o, gate, up, down;
};
struct Model {
    Size num_blocks, E, H, G, D, inner, window;
    const float *norm;
    Matrix head;
    Block blocks[];
};
struct Cache {  // layers: keys of (row, group, position, D); the values lie `values` numbers behind
    Size kind, values, row, group;
    void *layers[];
};

// LANES numbers in 32 bits. Of a loop GCC 12 makes many instructions, of a list one.
template <class T, size_t... I> inline Ints widen(const T *p, std::index_sequence<I...>) {
    return Ints{p[I]...};
}
template <class T> inline Ints widen(const T *p) {
    return widen(p, std::make_index_sequence<LANES>());
}
inline Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }
inline Floats load(const float *p) { Floats x; memcpy(&x, p, sizeof x); return x; }
inline Floats load(const BFloat16 *p) { return (Floats)(widen(&p->bits) << 16); }
inline Floats load(const int8_t *p) { return to_floats(widen(p)); }
inline Ints load(const int32_t *p) { Ints x; memcpy(&x, p, sizeof x); return x; }
inline Ints load(const uint8_t *p) {  // int4: two codes, half a row apart, as 16-bit numbers
    const Ints codes = widen(p);
    return (codes | codes << 12) & 0x000f000f;
}
inline Floats multiply_add(Floats total, Floats a, Floats b) { return total + a * b; }
inline Ints multiply_add(Ints total, Ints a, Ints b) {  // two 16-bit numbers in a lane of each
#if defined __AVX512BW__
    return total + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined __AVX2__
    return total + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return total + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}
inline void store(float *p, Floats x) { memcpy(p, &x, sizeof x); }
inline void store(BFloat16 *p, Floats x) {  // as its operator, which isn't vectorised here
    const Ints bits = (Ints)x, rounded = bits + 0x7fff + (bits >> 16 & 1);
    for (int i = 0; i < LANES; i++) p[i].bits = uint32_t(rounded[i]) >> 16;
}
inline float sum(Floats x) {
    typedef float Four __attribute__((vector_size(16)));
    Four parts[LANES / 4], y = {};
    memcpy(parts, &x, sizeof x);
    for (Four part : parts) y += part;
    return (y[0] + y[2]) + (y[1] + y[3]);
}

// R rows of a weight of type W with B activations x, T at a time → out (B, m.out), or added to it.
// x (B, in), but of int4 (B, in / 2), in pairs like its codes: 16-bit numbers times scales. `scales`
// (B, 2, groups): those of x, and its sums. Groups lie side by side in the lanes.
template <class W> constexpr bool IS_INT4 = std::is_same<W, uint8_t>();
template <class W> using Activation = std::conditional_t<IS_INT4<W>, int32_t, float>;
template <class W, int T = TILE, int R = ROWS>
void dot(const Matrix &m, Size row, const Activation<W> *x, const float *scales, Size B, float *out,
         bool add) {
    const Size in = IS_INT4<W> ? m.in / 2 : m.in, groups = IS_INT4<W> ? m.groups : LANES;
    // Memory comes faster in one stream: one row at a time, unless rows share what is read of x
    const Size ahead = R > 1 ? R * in : AHEAD / sizeof(W);
    Size rows[R];
    const W *weight[R];
    for (int r = 0; r < R; r++) {
        rows[r] = std::min(row + r, m.out - 1);
        weight[r] = (const W *)m.weight + rows[r] * in;
    }
    for (; B >= T; B -= T, x += T * in, scales += 2 * T * m.groups, out += T * m.out) {
        Floats total[R][T] = {};
        for (Size g = 0; g < groups; g += LANES) {
            decltype(load(x)) products[R][T] = {}, w[R];
            for (Size i = g; i < in; i += groups) {
                for (int r = 0; r < R; r++) {
                    w[r] = load(weight[r] + i);
                    __builtin_prefetch(weight[r] + i + ahead);
                }
                for (int t = 0; t < T; t++) {
                    const auto y = load(x + t * in + i);
                    for (int r = 0; r < R; r++)
                        products[r][t] = multiply_add(products[r][t], w[r], y);
                }
            }
            for (int r = 0; r < R; r++)
                for (int t = 0; t < T; t++)
                    if constexpr (IS_INT4<W>) {
                        const float *of_x = scales + 2 * t * groups + g;
                        const Floats scale = load(m.scales + rows[r] * groups + g) * load(of_x);
                        total[r][t] += to_floats(products[r][t]) * scale
                            + load(of_x + groups) * load(m.least + rows[r] * groups + g);
                    } else total[r][t] = products[r][t];
        }
        for (int r = 0; r < R && row + r < m.out; r++)
            for (int t = 0; t < T; t++) {
                float y = sum(total[r][t]), &to = out[t * m.out + row + r];
                if (std::is_same<W, int8_t>()) y *= ((const float *)m.scales)[row + r];
                if (m.bias) y += m.bias[row + r];
                to = add ? to + y : y;
            }
    }
    if constexpr (T == 2)
        for (Size r = row; B && r < std::min(row + ROWS, m.out); r++)
            dot<W, 1, 1>(m, r, x, scales, B, out, add);
    else if constexpr (T > 2) dot<W, T / 2>(m, row, x, scales, B, out, add);
}

// An activation x (in,) for int4: see dot
void quantize(const Matrix &m, const float *x, int32_t *pairs, float *scales) {
    const Size half = m.in / 2, groups = m.groups;
    for (Size i = 0; i < m.in; i += groups)
        for (Size g = 0; g < groups; g++) {
            scales[g] = std::max(scales[g], std::abs(x[i + g]) / 32767);
            scales[groups + g] += x[i + g];
        }
    for (Size i = 0; i < half; i += groups)
        for (Size g = 0; g < groups; g++) {
            const float per = scales[g] > 0 ? 1 / scales[g] : 0;
            const int low = std::rint(x[i + g] * per), high = std::rint(x[i + half + g] * per);
            pairs[i + g] = (low & 0xffff) | high << 16;
        }
}

// A weight with B activations x (B, in) → out (B, m.out), or added to it
void multiply(const Matrix &m, const float *x, Size B, float *out, bool add = false) {
    std::vector<float> scales(2 * B * m.groups);
    std::vector<int32_t> pairs(m.groups ? B * m.in / 2 : 0);
    for (Size b = 0; b < B && m.groups; b++)
        quantize(m, x + b * m.in, &pairs[b * m.in / 2], &scales[2 * b * m.groups]);
    auto kernel = m.kind == FP32 ? dot<float> : m.kind == BF16 ? dot<BFloat16> : dot<int8_t>;
#pragma omp for
    for (Size row = 0; row < m.out; row += ROWS)
        if (m.kind == INT4) dot<uint8_t>(m, row, pairs.data(), scales.data(), B, out, add);
        else kernel(m, row, x, nullptr, B, out, add);
}

// Attention of the `heads` queries q (heads, D) of a group, which the outcome replaces
template <class C>
void attend(const C *keys, const C *values, Size seen, Size heads, Size D, float *q, float *probs) {
    const Matrix matrix{keys, seen, D};
    for (Size row = 0; row < seen; row += ROWS)
        dot<C>(matrix, row, q, nullptr, heads, probs, false);
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
void run(const Model &m, const Cache &cache, const Size *positions, const float *angles, float *x,
         float *logits, Size B, float eps, int threads) {
    const Size D = m.D, heads = m.H / m.G;
    const Size longest = *std::max_element(positions, positions + B) + 1;
    std::vector<float> q(B * m.H * D), k(B * m.G * D), v(k), gate(B * m.inner), up(gate);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> normed(B * m.E), probs(heads * longest);
        auto norm = [&](const float *weight, const float *from, float *to, Size N, Size E) {
            float inv_rms;
            for (Size n = 0; n < N && weight; n++, from += E, to += E)
                rms_norm(from, weight, to, &inv_rms, 1, E, eps);
        };
        for (Size index = 0; index < m.num_blocks; index++) {
            const Block &block = m.blocks[index];
            norm(block.input_norm, x, normed.data(), B, m.E);
            multiply(block.q, normed.data(), B, q.data());
            multiply(block.k, normed.data(), B, k.data());
            multiply(block.v, normed.data(), B, v.data());
#pragma omp for
            for (Size i = 0; i < B * m.G; i++) {
                const Size b = i / m.G, end = positions[b] + 1;
                const Size begin = std::max(end - m.window, Size(0));
                C *keys = (C *)cache.layers[index] + b * cache.row + i % m.G * cache.group;
                C *values = keys + cache.values;
                float *queries = &q[i * heads * D], *key = &k[i * D];
                const float *angle = angles + b * 4 * D;
                norm(block.q_norm, queries, queries, heads, D);
                rotate(queries, angle, angle + D, queries, 1, heads, D);
                norm(block.k_norm, key, key, 1, D);
                rotate(key, angle + 2 * D, angle + 3 * D, key, 1, 1, D);
                for (Size d = 0; d < D; d++) {
                    keys[positions[b] * D + d] = key[d];
                    values[positions[b] * D + d] = v[i * D + d];
                }
                attend(keys + begin * D, values + begin * D, end - begin, heads, D, queries,
                       probs.data());
            }
            multiply(block.o, q.data(), B, x, true);
            norm(block.post_norm, x, normed.data(), B, m.E);
            multiply(block.gate, normed.data(), B, gate.data());
            multiply(block.up, normed.data(), B, up.data());
#pragma omp for simd
            for (Size i = 0; i < B * m.inner; i++) gate[i] = gate[i] * sigmoid(gate[i]) * up[i];
            multiply(block.down, gate.data(), B, x, true);
        }
        norm(m.norm, x, normed.data(), B, m.E);
        multiply(m.head, normed.data(), B, logits);
    }
}

template <class To> void unpack_as(const Matrix &m, To *out, int threads) {
    const Size half = m.in / 2;
#pragma omp parallel for num_threads(threads)
    for (Size row = 0; row < m.out; row++) {
        To *to = out + row * m.in;
        const int8_t *bytes = (const int8_t *)m.weight + row * m.in;
        for (Size i = 0; i < m.in && m.kind == INT8; i += LANES)
            store(to + i, load(bytes + i) * ((const float *)m.scales)[row]);
        const uint8_t *codes = (const uint8_t *)m.weight + row * half;
        for (Size g = 0; g < m.groups; g += LANES) {
            const Floats scale = load(m.scales + row * m.groups + g);
            const Floats least = load(m.least + row * m.groups + g);
            for (Size i = g; i < half; i += m.groups) {
                const Ints pairs = load(codes + i);
                store(to + i, to_floats(pairs & 15) * scale + least);
                store(to + i + half, to_floats(pairs >> 16) * scale + least);
            }
        }
    }
}

extern "C" {
// Appends to the first B rows of a cache, which hold `positions` tokens. x (B, E): the embeddings,
// which it overwrites. angles (B, 4, D): the queries' cos and sin, then the keys'. → logits (B, V)
void decode_step(const Model *model, const Cache *cache, const Size *positions, const float *angles,
                 float *x, float *logits, long B, float eps, long threads) {
    auto step = cache->kind == FP32 ? run<float> : run<BFloat16>;
    step(*model, *cache, positions, angles, x, logits, B, eps, threads);
}

// Writes an int8 or int4 weight in fp32 or bf16, for prompts
void unpack(const Matrix *m, void *out, long kind, long threads) {
    if (kind == FP32) unpack_as(*m, (float *)out, threads);
    else unpack_as(*m, (BFloat16 *)out, threads);
}
}
