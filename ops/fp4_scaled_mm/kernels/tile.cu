// x · Wᵀ on Hopper: W in 4 bits, decoded to E4M3 in registers; x in E4M3, one scale per token.
//
// The product is W · xᵀ, as tensor cores take their left operand from registers. One warp copies
// packed W, its scales and x to shared memory, 128 columns a stage; each warpgroup decodes and
// multiplies 64 rows of W, and decodes ahead of the tensor cores: while they multiply one half of a
// stage, it decodes the other. Where tiles are fewer than multiprocessors, the two blocks of a
// cluster have a tile together: each multiplies half of the columns, and finishes half of the tokens
// with the sums that the other one sends. Where one warpgroup's 64 rows are the tile, two may take
// its stages in turn, so that one decodes while the other multiplies, and each finishes half of the
// tokens with the other's sums.
//
// Blocks are set up while the kernel before, which quantizes x, still works. They read nothing
// before it has ended, but have W's scales fetched to the L2 cache.
//
// Four files, compiled as one by NVRTC for sm_90a, after ops/cuda/hopper.cu and the instruction
// `multiply` (hopper.py): decode.cu, this one with what the others share, finish.cu with what follows
// the products, multiply.cu with the kernel. Defined from outside:
//   GROUP    elements of W that share a scale: 16, E4M3 scales; 32, E8M0 scales
//   GROUPS   of 64 rows of W, of a block of threads
//   TOKENS   rows of x of a block of threads
//   STAGES   of shared memory
//   PARTS    blocks of a cluster, 1 or 2, which share the columns of a tile
//   TURNS    warpgroups, 1 or 2, that share the columns of 64 rows; with 2, PARTS and GROUPS are 1
//   OUT      type of the result

#define OUT_BF16 0
#define OUT_FP16 1
#define OUT_FP32 2

struct Params {
    const unsigned char* scale;  // of blocks of W, swizzled: [scale_rows, scale_columns, 512]
    const float* token_scale;    // [tokens], or [1]
    const float* tensor_scale;   // [1], or null
    const void* bias;            // [rows], or null
    void* out;                   // [tokens, rows]
    int token_step;              // 1, or 0 for one scale
    int bias_type;               // as OUT
    int rows, tokens, stages;    // stages: of 128 columns
    int scale_rows, scale_columns;
    Numbers numbers;
};

constexpr int COLUMNS = 128;
constexpr int ROWS = 64 * GROUPS;
// Warps that use a stage; warpgroups that multiply, and that have the columns of a tile together.
constexpr int WARPS = 4 * GROUPS;
constexpr int WORKERS = GROUPS * TURNS;
constexpr int SHARES = PARTS * TURNS;
constexpr int SUMS = TOKENS / 2;
// Of a block's tokens, and of a thread's sums, those that one of SHARES finishes.
constexpr int OWN_TOKENS = TOKENS / SHARES;
constexpr int OWN_SUMS = SUMS / SHARES;
constexpr int X_BYTES = TOKENS * COLUMNS;
constexpr int W_ROW_BYTES = COLUMNS / 2;
constexpr int W_BYTES = ROWS * W_ROW_BYTES;
// Blocks of 128 rows of scales that the rows of a block of threads lie in.
constexpr int SCALE_ROWS = GROUPS <= 2 ? 1 : 2;
constexpr int CHANNEL_BYTES = 128;
// Loads that are under way together before the first product.
constexpr int AT_ONCE = 32;
constexpr int THREADS = 128 * (WORKERS + 1);
// Registers: of a thread when the kernel starts; of one that copies; then of one that multiplies.
constexpr int REGISTERS = 65536 / THREADS / 8 * 8;
constexpr int FEW_REGISTERS = 24;
constexpr int ROOM = (REGISTERS * (WORKERS + 1) - FEW_REGISTERS) / WORKERS / 8 * 8;
constexpr int MANY_REGISTERS = ROOM < 240 ? ROOM : 240;

struct Shared {
    u32 x, w, scale, sums, full, empty, added;
};

// What a thread needs of its rows, `row` of the 64 of the warpgroup and 8 below.
struct Rows {
    u32 w, scale;      // where its bytes begin, in the first stage
    float inverse[2];  // of the scales
    float factor[2];   // of the sums
    u32 bias[2];       // as it is stored
};

// A place in the ring of stages.
typedef Slots<STAGES> Ring;
// Else the fills of a place would be awaited by one warpgroup and the other in turn, and the second
// could take the phase before the first fill for that after it.
static_assert(TURNS == 1 || (PARTS == 1 && GROUPS == 1 && STAGES % TURNS == 0), "turns");

__device__ __forceinline__ int first_row() { return blockIdx.y * ROWS; }
__device__ __forceinline__ int first_token() { return blockIdx.x * TOKENS; }
// Which of the cluster's blocks this one is; which of its tile's warpgroups.
__device__ __forceinline__ int part() { return PARTS == 1 ? 0 : blockIdx.z; }
__device__ __forceinline__ int turn() {
    return TURNS == 1 ? 0 : __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
}
// The first token in the tile that is finished here.
__device__ __forceinline__ int first_own() { return (part() + turn()) * OWN_TOKENS; }
// Stages of the block: from its own first to the next block's.
__device__ __forceinline__ int first_stage(const Params& args, int of) {
    return args.stages * of / PARTS;
}
// Waits for the warpgroup; for all warpgroups that multiply.
__device__ __forceinline__ void group_sync() {
    asm volatile("bar.sync %0, 128;" ::"r"(2 + threadIdx.x / 128) : "memory");
}
__device__ __forceinline__ void all_sync() {
    asm volatile("bar.sync 1, %0;" ::"n"(128 * WORKERS) : "memory");
}
