// What the kernels use of WGSL's types and functions, in CUDA C++. translate.py puts it first.
#pragma once

typedef unsigned u32;
typedef int i32;
typedef float f32;
#define FN __device__ __forceinline__

template <class T> struct vec2 {
    T x, y;
    FN vec2(T x, T y) : x(x), y(y) {}
    FN explicit vec2(T all) : x(all), y(all) {}
    vec2() = default;
};

template <class T> struct vec3 {
    T x, y, z;
};

// A quad is loaded and stored at once.
template <class T> struct alignas(sizeof(T) == 4 ? 16 : 4) vec4 {
    T x, y, z, w;
    FN vec4(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
    FN explicit vec4(T all) : x(all), y(all), z(all), w(all) {}
    vec4() = default;
    FN vec2<T> xz() const { return vec2<T>(x, z); }
    FN vec2<T> yw() const { return vec2<T>(y, w); }
    FN T operator[](u32 i) const { return i == 0 ? x : i == 1 ? y : i == 2 ? z : w; }
};

#define ARITHMETIC(o)                                                                                                  \
    template <class T> FN vec4<T> operator o(vec4<T> a, vec4<T> b) {                                                   \
        return vec4<T>(a.x o b.x, a.y o b.y, a.z o b.z, a.w o b.w);                                                    \
    }
#define COMPARISON(o)                                                                                                  \
    template <class T> FN vec4<bool> operator o(vec4<T> a, vec4<T> b) {                                                \
        return vec4<bool>(a.x o b.x, a.y o b.y, a.z o b.z, a.w o b.w);                                                 \
    }
ARITHMETIC(+) ARITHMETIC(-) ARITHMETIC(*) ARITHMETIC(/) ARITHMETIC(&) ARITHMETIC(|) ARITHMETIC(<<) ARITHMETIC(>>)
COMPARISON(<) COMPARISON(<=) COMPARISON(>) COMPARISON(>=) COMPARISON(==) COMPARISON(!=)
template <class T> FN vec4<T> operator*(T a, vec4<T> b) { return vec4<T>(a) * b; }
template <class T> FN vec4<T> operator*(vec4<T> a, T b) { return a * vec4<T>(b); }
template <class T> FN vec4<T> operator+(T a, vec4<T> b) { return vec4<T>(a) + b; }
template <class T> FN vec4<T> operator+(vec4<T> a, T b) { return a + vec4<T>(b); }
template <class T> FN vec4<T> operator-(vec4<T> a, T b) { return a - vec4<T>(b); }
template <class T> FN void operator+=(vec4<T>& a, vec4<T> b) { a = a + b; }
template <class T> FN void operator-=(vec4<T>& a, vec4<T> b) { a = a - b; }
template <class T> FN vec2<T> operator*(vec2<T> a, T b) { return vec2<T>(a.x * b, a.y * b); }
template <class T> FN vec2<T> operator|(vec2<T> a, vec2<T> b) { return vec2<T>(a.x | b.x, a.y | b.y); }
template <class T> FN vec2<T> operator<<(vec2<T> a, vec2<T> b) { return vec2<T>(a.x << b.x, a.y << b.y); }

template <class T> __host__ __device__ constexpr T select(T no, T yes, bool which) { return which ? yes : no; }
template <class T> FN vec4<T> select(vec4<T> no, vec4<T> yes, vec4<bool> which) {
    return vec4<T>(which.x ? yes.x : no.x, which.y ? yes.y : no.y, which.z ? yes.z : no.z, which.w ? yes.w : no.w);
}
FN bool any(vec4<bool> a) { return a.x || a.y || a.z || a.w; }

FN u32 abs(i32 a, int) { return ::abs(a); }
FN f32 floor_of(f32 a) { return ::floorf(a); }
template <class T> FN vec4<T> max(vec4<T> a, vec4<T> b) {
    return vec4<T>(max(a.x, b.x), max(a.y, b.y), max(a.z, b.z), max(a.w, b.w));
}
template <class T> FN vec4<T> min(vec4<T> a, vec4<T> b) {
    return vec4<T>(min(a.x, b.x), min(a.y, b.y), min(a.z, b.z), min(a.w, b.w));
}
template <class T> FN T clamp(T a, T low, T high) { return min(max(a, low), high); }
FN vec4<f32> abs(vec4<f32> a) { return vec4<f32>(fabsf(a.x), fabsf(a.y), fabsf(a.z), fabsf(a.w)); }
FN vec4<f32> sqrt(vec4<f32> a) { return vec4<f32>(sqrtf(a.x), sqrtf(a.y), sqrtf(a.z), sqrtf(a.w)); }
FN u32 countLeadingZeros(u32 a) { return __clz(a); }
FN u32 countOneBits(u32 a) { return __popc(a); }

template <class T, class U> FN T bitcast(U from) {
    static_assert(sizeof(T) == sizeof(U), "");
    T to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

FN vec2<f32> unpack2x16float(u32 halves) {
    vec2<f32> both;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(both.x), "=f"(both.y) : "r"(halves));
    return both;
}
FN void workgroupBarrier() { __syncthreads(); }
FN u32 subgroupAdd(u32 a) { return __reduce_add_sync(~0u, a); }
FN u32 subgroupMax(u32 a) { return __reduce_max_sync(~0u, a); }
FN i32 subgroupMax(i32 a) { return __reduce_max_sync(~0u, a); }
FN u32 subgroupMin(u32 a) { return __reduce_min_sync(~0u, a); }
FN u32 subgroupOr(u32 a) { return __reduce_or_sync(~0u, a); }
