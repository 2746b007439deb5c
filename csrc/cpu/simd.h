// Vectors of float, and what the kernels need of them. Compiled once for each instruction set, in a namespace of its
// own (DIFFSEG_ISA): no template or inline function of the standard library may be used from here, because the linker
// keeps one copy of those, and a copy with AVX-512 in it would reach the other instruction sets.
#pragma once

#include <cstdint>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace diffseg::DIFFSEG_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kTall = 12;            // rows of a product's tile; kTall x 2 vectors stay in registers
constexpr int kLefts = 6, kRights = 4;  // tile of pairs
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kTall = 6;
constexpr int kLefts = 3, kRights = 3;
#else
constexpr int kLanes = 4;
constexpr int kTall = 6;
constexpr int kLefts = 3, kRights = 3;
#endif
constexpr int kWide = 2 * kLanes;  // columns of a product's tile

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));

// Taking zero away changes no value, where adding it to -0 does: the compiler leaves a plain broadcast.
inline Vec splat(float value) { return value - Vec{}; }

inline Vec load(const float* from) {
    Vec value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}

inline void store(float* to, Vec value) { __builtin_memcpy(to, &value, sizeof value); }

// The larger lanes; where one is NaN, b.
inline Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
    return _mm_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

inline Vec smaller(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
    return _mm_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
}

template <class T>
inline T least(T a, T b) {
    return b < a ? b : a;
}

template <class T>
inline T most(T a, T b) {
    return a < b ? b : a;
}

// Halves added until four lanes are left: in order, lane by lane, is one long chain.
inline float sum(Vec value) {
    typedef float Four __attribute__((vector_size(16)));
    Four quarters[kLanes / 4];
    __builtin_memcpy(quarters, &value, sizeof value);
    for (int half = kLanes / 8; half > 0; half /= 2)
        for (int part = 0; part < half; ++part) quarters[part] += quarters[part + half];
    const Four four = quarters[0];
    return four[0] + four[2] + (four[1] + four[3]);
}

inline float maximum(Vec value) {
    float best = value[0];
    for (int lane = 1; lane < kLanes; ++lane) best = most(best, value[lane]);
    return best;
}

// Sum over j < length of term(j), where vector_term(j) is term of kLanes values from j on.
template <class VectorTerm, class Term>
inline float total(int64_t length, VectorTerm vector_term, Term term) {
    Vec lanes[4] = {};
    int64_t j = 0;
    for (; j + 4 * kLanes <= length; j += 4 * kLanes)
        for (int part = 0; part < 4; ++part) lanes[part] += vector_term(j + part * kLanes);
    float rest = 0;
    for (; j < length; ++j) rest += term(j);
    return sum(lanes[0] + lanes[1] + (lanes[2] + lanes[3])) + rest;
}

// x - x is NaN for infinity too.
inline bool finite(float value) { return value - value == 0; }

constexpr float kLog2E = 1.44269504f;

// 2^x within 1.2e-7 relative: x = whole + rest, |rest| <= 1/2, polynomial of degree 5 (minimax in relative error).
// Zero below 2^-126.5, infinity not reached; NaN stays NaN.
inline Vec exp2(Vec x) {
    const Vec magic = splat(12582912.0f + 127.0f);  // 1.5 * 2^23: adding it leaves x rounded in the lowest bits
    x = larger(splat(-127.0f), smaller(splat(127.0f), x));
    const Vec shifted = x + magic;
    const Vec power = (Vec)((Ints)shifted << 23);
    const Vec rest = x - (shifted - magic);
    Vec value = splat(1.3264727066e-03f);
    value = value * rest + 9.6715126489e-03f;
    value = value * rest + 5.5507337437e-02f;
    value = value * rest + 2.4022242085e-01f;
    value = value * rest + 6.9314697760e-01f;
    value = value * rest + 1.0f;
    return value * power;
}

// Natural logarithm of a positive normal number within 1.2e-7 relative or absolute: x = 2^e (1 + f), 1 + f from
// sqrt(1/2) to sqrt(2), log(1 + f) = f - f^2 / 2 + f^3 P(f), P of degree 6 (minimax).
inline Vec log(Vec x) {
    const Ints bits = (Ints)x;
    const Ints exponent = (bits - 0x3f3504f3) >> 23;
    const Vec f = (Vec)(bits - (exponent << 23)) - 1.0f;
    const Vec e = __builtin_convertvector(exponent, Vec);
    Vec value = splat(8.7004345269e-02f);
    value = value * f - 1.4267486774e-01f;
    value = value * f + 1.4914768227e-01f;
    value = value * f - 1.6577584698e-01f;
    value = value * f + 1.9963063776e-01f;
    value = value * f - 2.5001337037e-01f;
    value = value * f + 3.3333910738e-01f;
    const Vec square = f * f;
    return e * 6.9314718056e-01f + (f - square * 0.5f + square * f * value);
}

// Uninitialised memory on a cache line.
template <class T>
class Buffer {
public:
    explicit Buffer(int64_t length)
        : data_(static_cast<T*>(::operator new(static_cast<size_t>(length) * sizeof(T), std::align_val_t(64)))) {}
    ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    operator T*() const { return data_; }

private:
    T* data_;
};

inline int thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

inline float from_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

inline float widen(float value) { return value; }

struct Bfloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

inline float widen(Bfloat16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }

// 2 * kLanes values, as their bits.
inline Vec load(const Bfloat16* from) {
    Vec bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    return bits;
}

// The product rebiases the exponent, of subnormal numbers too; the largest exponent, of NaN and infinity, stays.
inline float widen(Float16 value) {
    const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
    const float scaled = from_bits(magnitude) * 0x1p112f;
    uint32_t bits;
    __builtin_memcpy(&bits, &scaled, sizeof bits);
    bits |= magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
    return from_bits(bits | (value.bits & 0x8000u) << 16);
}

// kLanes values from `from` on, widened.
inline Vec lanes(const float* from) { return load(from); }

inline Ints half_lanes(const void* from) {
    typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
    Halves bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    return __builtin_convertvector(bits, Ints);
}

inline Vec lanes(const Bfloat16* from) { return (Vec)(half_lanes(from) << 16); }

inline Vec lanes(const Float16* from) {
    const Ints half = half_lanes(from), magnitude = (half & 0x7fff) << 13;
    const Ints bits = (Ints)((Vec)magnitude * 0x1p112f) | ((magnitude >= 0x0f800000) & 0x7f800000);
    return (Vec)(bits | (half & 0x8000) << 16);
}

// Calls function(typed pointer) for the element `offset` of the view.
template <class Function>
inline void typed(const View& view, int64_t offset, Function function) {
    switch (view.type) {
        case Type::float32: return function(static_cast<const float*>(view.data) + offset);
        case Type::bfloat16: return function(static_cast<const Bfloat16*>(view.data) + offset);
        case Type::float16: return function(static_cast<const Float16*>(view.data) + offset);
    }
}

// Elements `offset`, `offset` + 1, ... as floats: in place, or converted into `line`.
inline const float* floats(const View& view, int64_t offset, int64_t length, float* line) {
    if (view.type == Type::float32) return static_cast<const float*>(view.data) + offset;
    typed(view, offset, [=](const auto* from) {
        for (int64_t i = 0; i < length; ++i) line[i] = widen(from[i]);
    });
    return line;
}

inline int64_t ceil_div(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

inline int64_t round_up(int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; }

// Rows [first, first + width) of a head, transposed: to[k * width + j] = view[first + j, k] * factor, 0 past the end.
inline void pack(const View& view, int64_t item, int64_t head, int64_t first, int64_t cells, int64_t width,
                 int64_t depth, float factor, float* to) {
    const int64_t listed = most<int64_t>(least(width, cells - first), 0);
    typed(view, item * view.batch + head * view.head + first * view.row, [&](const auto* from) {
        for (int64_t k = 0; k < depth; ++k) {
            for (int64_t j = 0; j < listed; ++j)
                to[k * width + j] = widen(from[j * view.row + k * view.column]) * factor;
            for (int64_t j = listed; j < width; ++j) to[k * width + j] = 0.0f;
        }
    });
}

constexpr float kZeros[kWide] = {};  // where most products start

// tile[i][.] = start + sum over k of left[k * kTall + i] * right(k)[.], kWide columns.
template <class Right>
inline __attribute__((always_inline)) void multiply(Vec (&tile)[kTall][2], const float* start, const float* left,
                                                    int64_t depth, Right right) {
#pragma GCC unroll 12
    for (int i = 0; i < kTall; ++i) {
        tile[i][0] = load(start);
        tile[i][1] = load(start + kLanes);
    }
    for (int64_t k = 0; k < depth; ++k) {
        const float* row = right(k);
        const Vec first = load(row), second = load(row + kLanes);
#pragma GCC unroll 12
        for (int i = 0; i < kTall; ++i) {
            const Vec factor = splat(left[k * kTall + i]);
            tile[i][0] += factor * first;
            tile[i][1] += factor * second;
        }
    }
}

}  // namespace diffseg::DIFFSEG_ISA
