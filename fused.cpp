// What model.py does in chunks of rows, fused for a CPU: bf16 or fp32 in and out, fp32 within.
// fused.py builds this file and calls it. It includes nothing of torch's, so it compiles in seconds.
//
// N rows, E columns, H heads of D. All arrays are contiguous; `x`, `out` and gradients of one type.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>

struct BFloat16 {
    uint16_t bits;
    operator float() const {
        uint32_t wide = uint32_t(bits) << 16;
        float value;
        memcpy(&value, &wide, 4);
        return value;
    }
    BFloat16& operator=(float value) {  // rounds to the nearest, ties to even
        uint32_t wide;
        memcpy(&wide, &value, 4);
        uint32_t rounded = (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
        bits = value != value ? 0x7fc0 : rounded;
        return *this;
    }
};

static inline float exponential(float x) {
    // 2^n * exp(r), |r| <= ln(2) / 2: a polynomial, so that loops are vectorised
    x = x > 87 ? 87 : x < -87 ? -87 : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float power = 1 + r * (1 + r * (0.5f + r * (0.166666652f + r * (0.0416667563f
                  + r * (0.00833345205f + r * 0.00139335990f)))));
    uint32_t bits = uint32_t(int32_t(n) + 127) << 23;  // of NaN any: the power is NaN
    float two_n;
    memcpy(&two_n, &bits, 4);
    return power * two_n;
}

static inline float sigmoid(float x) { return 1 / (1 + exponential(-x)); }

template <typename T>
void rms_norm(const T* x, const float* weight, T* out, float* inv_rms, long N, long E, float eps) {
    #pragma omp parallel for if (N > 1)
    for (long n = 0; n < N; n++) {
        const T* row = x + n * E;
        T* to = out + n * E;
        float squares = 0;
        #pragma omp simd reduction(+ : squares)
        for (long e = 0; e < E; e++) squares += float(row[e]) * float(row[e]);
        float inv = inv_rms[n] = 1 / sqrtf(squares / E + eps);
        #pragma omp simd
        for (long e = 0; e < E; e++) to[e] = float(row[e]) * inv * weight[e];
    }
}

// `grad_weight`: (threads, E) zeros, the sum of a thread's rows; or null
template <typename T>
void rms_norm_backward(const T* grad, const T* x, const float* weight, const float* inv_rms, T* out,
                       float* grad_weight, long N, long E) {
    #pragma omp parallel for if (N > 1)
    for (long n = 0; n < N; n++) {
        const T *g = grad + n * E, *row = x + n * E;
        T* to = out + n * E;
        float inv = inv_rms[n], along = 0;
        #pragma omp simd reduction(+ : along)
        for (long e = 0; e < E; e++) along += float(g[e]) * weight[e] * float(row[e]);
        along *= inv * inv * inv / E;
        #pragma omp simd
        for (long e = 0; e < E; e++)
            to[e] = float(g[e]) * weight[e] * inv - float(row[e]) * along;
        if (!grad_weight) continue;
        float* sum = grad_weight + omp_get_thread_num() * E;
        #pragma omp simd
        for (long e = 0; e < E; e++) sum[e] += float(g[e]) * float(row[e]) * inv;
    }
}

template <typename T>
void swiglu(const T* gate, const T* up, T* out, long size) {
    #pragma omp parallel for simd if (parallel : size > 4096)
    for (long i = 0; i < size; i++) out[i] = float(gate[i]) * sigmoid(gate[i]) * float(up[i]);
}

template <typename T>
void swiglu_backward(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up,
                     long size) {
    #pragma omp parallel for simd if (parallel : size > 4096)
    for (long i = 0; i < size; i++) {
        float g = grad[i], x = gate[i], s = sigmoid(x);
        grad_up[i] = g * x * s;
        grad_gate[i] = g * float(up[i]) * s * (1 + x * (1 - s));
    }
}

// Halves of a head are rotated against each other; cos and signed sin: (N, D)
template <typename T>
void rotate(const T* x, const float* cos, const float* sin, T* out, long N, long H, long D) {
    #pragma omp parallel for if (N > 1)
    for (long n = 0; n < N; n++) {
        const float *c = cos + n * D, *s = sin + n * D;
        for (long h = 0; h < H; h++) {
            const T* from = x + (n * H + h) * D;
            T* to = out + (n * H + h) * D;
            #pragma omp simd
            for (long d = 0; d < D / 2; d++) {
                float first = from[d], second = from[d + D / 2];
                to[d] = first * c[d] + second * s[d];
                to[d + D / 2] = second * c[d + D / 2] + first * s[d + D / 2];
            }
        }
    }
}

// --- attention; see QueryBlocks in model.py
//
// Scores are (blocks, G, size, heads, columns), with `heads` heads a group: blocks * G products.

// Probabilities in place of scores. A query sees the columns from first_seen (blocks, size) to its
// own; the last query's is the last column. Columns are a multiple of 16 and loops take 16 at a
// time: none has a remainder. `powers` takes 4 bytes a column of a thread's stack.
template <typename T>
void softmax(T* scores, const int32_t* first_seen, long blocks, long G, long size, long heads,
             long columns) {
    #pragma omp parallel for
    for (long row = 0; row < blocks * G * size * heads; row++) {
        long query = row / heads % size, block = row / (G * size * heads);
        long begin = first_seen[block * size + query];
        long end = columns - size + query + 1, from = begin / 16 * 16, to = (end + 15) / 16 * 16;
        T* x = scores + row * columns;
        float largest[16], sums[16] = {}, powers[columns], top = -INFINITY, sum = 0;
        for (long i = 0; i < 16; i++) largest[i] = -INFINITY;
        for (long c = from; c < to; c += 16)
            for (long i = 0; i < 16; i++) {
                float score = c + i >= begin && c + i < end ? float(x[c + i]) : -INFINITY;
                powers[c + i] = score;
                largest[i] = score > largest[i] ? score : largest[i];
            }
        for (long i = 0; i < 16; i++) top = largest[i] > top ? largest[i] : top;
        for (long c = from; c < to; c += 16)
            for (long i = 0; i < 16; i++) {
                float score = powers[c + i];
                float power = score == -INFINITY ? 0 : exponential(score - top);
                powers[c + i] = power;
                sums[i] += power;
            }
        for (long i = 0; i < 16; i++) sum += sums[i];
        memset(x, 0, from * sizeof(T));
        for (long c = from; c < to; c += 16)
            for (long i = 0; i < 16; i++) x[c + i] = powers[c + i] * (1 / sum);
        memset(x + to, 0, (columns - to) * sizeof(T));
    }
}

// The gradient of the scores, in place of that of the probabilities, which are 0 where hidden
template <typename T>
void softmax_backward(T* grad, const T* probabilities, const int32_t* first_seen, long blocks,
                      long G, long size, long heads, long columns) {
    #pragma omp parallel for
    for (long row = 0; row < blocks * G * size * heads; row++) {
        long query = row / heads % size, block = row / (G * size * heads);
        long from = first_seen[block * size + query] / 16 * 16;
        long to = (columns - size + query + 16) / 16 * 16;
        T* g = grad + row * columns;
        const T* p = probabilities + row * columns;
        float sums[16] = {}, sum = 0;
        for (long c = from; c < to; c += 16)
            for (long i = 0; i < 16; i++) sums[i] += float(g[c + i]) * float(p[c + i]);
        for (long i = 0; i < 16; i++) sum += sums[i];
        memset(g, 0, from * sizeof(T));
        for (long c = from; c < to; c += 16)
            for (long i = 0; i < 16; i++) g[c + i] = float(p[c + i]) * (float(g[c + i]) - sum);
        memset(g + to, 0, (columns - to) * sizeof(T));
    }
}

// x (N, G * heads, D) → (blocks, G, length, heads, D): `length` tokens from each of `firsts` on
template <typename T>
void gather_blocks(const T* x, const int64_t* firsts, T* out, long blocks, long G, long length,
                   long heads, long D, long N, float scale) {
    #pragma omp parallel for
    for (long row = 0; row < blocks * G * length; row++) {
        long token = firsts[row / (G * length)] + row % length, group = row / length % G;
        T* to = out + row * heads * D;
        const T* from = x + (token * G + group) * heads * D;
        if (token >= N) memset(to, 0, heads * D * sizeof(T));
        else if (scale == 1) memcpy(to, from, heads * D * sizeof(T));
        else for (long i = 0; i < heads * D; i++) to[i] = float(from[i]) * scale;
    }
}

// The way back: x is added to total (N, G * heads, D). Blocks may overlap, groups don't.
template <typename T, typename Total>
void add_blocks(const T* x, const int64_t* firsts, Total* total, long blocks, long G, long length,
                long heads, long D, long N) {
    #pragma omp parallel for
    for (long group = 0; group < G; group++)
        for (long block = 0; block < blocks; block++)
            for (long n = 0; n < length && firsts[block] + n < N; n++) {
                Total* to = total + ((firsts[block] + n) * G + group) * heads * D;
                const T* from = x + ((block * G + group) * length + n) * heads * D;
                for (long i = 0; i < heads * D; i++) to[i] = float(to[i]) + float(from[i]);
            }
}

// clang-format off
#define EXPORT(T, name)                                                                          \
    void rms_norm_##name(const T* x, const float* weight, T* out, float* inv_rms, long N, long E, \
                         float eps) { rms_norm(x, weight, out, inv_rms, N, E, eps); }             \
    void rms_norm_backward_##name(const T* grad, const T* x, const float* weight,                 \
                                  const float* inv_rms, T* out, float* grad_weight, long N,       \
                                  long E) {                                                       \
        rms_norm_backward(grad, x, weight, inv_rms, out, grad_weight, N, E); }                    \
    void swiglu_##name(const T* gate, const T* up, T* out, long size) {                           \
        swiglu(gate, up, out, size); }                                                            \
    void swiglu_backward_##name(const T* grad, const T* gate, const T* up, T* grad_gate,          \
                                T* grad_up, long size) {                                          \
        swiglu_backward(grad, gate, up, grad_gate, grad_up, size); }                              \
    void rotate_##name(const T* x, const float* cos, const float* sin, T* out, long N, long H,    \
                       long D) { rotate(x, cos, sin, out, N, H, D); }                             \
    void softmax_##name(T* scores, const int32_t* first_seen, long blocks, long G, long size,     \
                        long heads, long columns) {                                               \
        softmax(scores, first_seen, blocks, G, size, heads, columns); }                           \
    void softmax_backward_##name(T* grad, const T* probabilities, const int32_t* first_seen,      \
                                 long blocks, long G, long size, long heads, long columns) {      \
        softmax_backward(grad, probabilities, first_seen, blocks, G, size, heads, columns); }     \
    void gather_blocks_##name(const T* x, const int64_t* firsts, T* out, long blocks, long G,     \
                              long length, long heads, long D, long N, float scale) {             \
        gather_blocks(x, firsts, out, blocks, G, length, heads, D, N, scale); }                   \
    void add_blocks_##name(const T* x, const int64_t* firsts, T* total, long blocks, long G,      \
                           long length, long heads, long D, long N) {                             \
        add_blocks(x, firsts, total, blocks, G, length, heads, D, N); }                           \
    void add_blocks_to_float32_##name(const T* x, const int64_t* firsts, float* total,            \
                                      long blocks, long G, long length, long heads, long D,       \
                                      long N) {                                                   \
        add_blocks(x, firsts, total, blocks, G, length, heads, D, N); }

extern "C" {
EXPORT(float, float32)
EXPORT(BFloat16, bfloat16)
}
