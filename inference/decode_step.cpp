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
inline Floats load(const float *p, int = 0) { Floats x; memcpy(&x, p, sizeof x); return x; }
inline Floats load(const BFloat16 *p, int = 0) { return (Floats)(widen(&p->bits) << 16); }
inline Floats load(const int8_t *p, int = 0) { return to_floats(widen(p)); }
inline Floats load(const uint8_t *p, int part) {  // int4: two inputs, half a row apart
    return to_floats(part ? widen(p) >> 4 : widen(p) & 15);
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

// ROWS rows of a weight of type W with B activations x (B, in), T at a time → out (B, m.out), or
// added to it. int4: groups lie side by side in the lanes, and `sums` (B, groups) are those of x.
template <class W, int T = TILE>
void dot(const Matrix &m, Size row, const float *x, const float *sums, Size B, float *out,
         bool add) {
    constexpr int PARTS = std::is_same<W, uint8_t>() ? 2 : 1;
    const Size part = m.in / PARTS, groups = PARTS == 2 ? m.groups : LANES;
    Size rows[ROWS];
    const W *weight[ROWS];
    for (int r = 0; r < ROWS; r++) {
        rows[r] = std::min(row + r, m.out - 1);
        weight[r] = (const W *)m.weight + rows[r] * part;
    }
    for (; B >= T; B -= T, x += T * m.in, sums += T * m.groups, out += T * m.out) {
        Floats total[ROWS][T] = {};
        for (Size g = 0; g < groups; g += LANES) {
            Floats products[ROWS][T] = {};
            for (Size i = g; i < part; i += groups) {
                Floats w[PARTS][ROWS];
                for (int r = 0; r < ROWS; r++) {
                    for (int p = 0; p < PARTS; p++) w[p][r] = load(weight[r] + i, p);
                    __builtin_prefetch(weight[r] + i + ROWS * part);
                }
                for (int t = 0; t < T; t++)
                    for (int p = 0; p < PARTS; p++) {
                        const Floats y = load(x + t * m.in + p * part + i);
                        for (int r = 0; r < ROWS; r++) products[r][t] += w[p][r] * y;
                    }
            }
            for (int r = 0; r < ROWS; r++) {
                const Size at = rows[r] * groups + g;
                for (int t = 0; t < T; t++)
                    if (PARTS == 1) total[r][t] = products[r][t];
                    else total[r][t] += products[r][t] * load(m.scales + at)
                                      + load(sums + t * groups + g) * load(m.least + at);
            }
        }
        for (int r = 0; r < ROWS && row + r < m.out; r++)
            for (int t = 0; t < T; t++) {
                float y = sum(total[r][t]), &to = out[t * m.out + row + r];
                if (std::is_same<W, int8_t>()) y *= ((const float *)m.scales)[row + r];
                if (m.bias) y += m.bias[row + r];
                to = add ? to + y : y;
            }
    }
    if constexpr (T > 1) if (B) dot<W, T / 2>(m, row, x, sums, B, out, add);
}

// A weight with B activations x (B, in) → out (B, m.out), or added to it
void multiply(const Matrix &m, const float *x, Size B, float *out, bool add = false) {
    std::vector<float> sums(B * m.groups);
    for (Size b = 0; b < B && m.groups; b++)
        for (Size i = 0; i < m.in; i += m.groups)
            for (Size g = 0; g < m.groups; g++) sums[b * m.groups + g] += x[b * m.in + i + g];
    auto kernel = m.kind == FP32 ? dot<float> : m.kind == BF16 ? dot<BFloat16>
                : m.kind == INT8 ? dot<int8_t> : dot<uint8_t>;
#pragma omp for
    for (Size row = 0; row < m.out; row += ROWS) kernel(m, row, x, sums.data(), B, out, add);
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
            for (Size i = g; i < half; i += m.groups)
                for (int part = 0; part < 2; part++)
                    store(to + i + part * half, load(codes + i, part) * scale + least);
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
