// 8 neighbouring numbers that a thread reads together, after ampere.cu.

const int ABSENT = -1;
const int WIDTH = 8;

// 8 columns as they lie in memory.
template <int DTYPE> struct Vector {
    uint4 part[DTYPE == FP32 ? 2 : 1];

    __device__ __forceinline__ void read(const char* base, int column, bool once = false) {
        const char* const p = base + column * (DTYPE == FP32 ? 4 : 2);
        part[0] = once ? load_once(p) : load(p);
        if (DTYPE == FP32) part[DTYPE == FP32] = once ? load_once(p + 16) : load(p + 16);
    }
    __device__ __forceinline__ void floats(float (&v)[WIDTH]) const {
        if (DTYPE == FP32) {
            const uint4 p = part[0], q = part[DTYPE == FP32];
            v[0] = __uint_as_float(p.x), v[1] = __uint_as_float(p.y);
            v[2] = __uint_as_float(p.z), v[3] = __uint_as_float(p.w);
            v[4] = __uint_as_float(q.x), v[5] = __uint_as_float(q.y);
            v[6] = __uint_as_float(q.z), v[7] = __uint_as_float(q.w);
        } else {
            unpack<DTYPE>(part[0].x, v[0], v[1]);
            unpack<DTYPE>(part[0].y, v[2], v[3]);
            unpack<DTYPE>(part[0].z, v[4], v[5]);
            unpack<DTYPE>(part[0].w, v[6], v[7]);
        }
    }
    // A right operand, rounded to the dtype: v in the order of columns.
    __device__ __forceinline__ void round(const float (&v)[WIDTH]) {
        if (DTYPE == FP32) {
            part[0] = make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]),
                                 __float_as_uint(v[2]), __float_as_uint(v[3]));
            part[DTYPE == FP32] = make_uint4(__float_as_uint(v[4]), __float_as_uint(v[5]),
                                             __float_as_uint(v[6]), __float_as_uint(v[7]));
        } else {
            part[0] = make_uint4(pack<DTYPE>(v[0], v[1]), pack<DTYPE>(v[2], v[3]),
                                 pack<DTYPE>(v[4], v[5]), pack<DTYPE>(v[6], v[7]));
        }
    }
};
// A modulation that is not there takes no registers.
template <> struct Vector<ABSENT> {
    __device__ __forceinline__ void read(const char*, int) {}
    __device__ __forceinline__ void floats(float (&)[WIDTH]) const {}
};
