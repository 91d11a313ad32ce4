// The order in which tiles are begun: in groups of GROUP rows of tiles, which share columns in the
// L2 cache. With DOWN, the heads of the first rows come before all others, and those of later rows
// a group before their rows. `order` in hopper.py says the same, tile by tile.

// The tile at place t, row | column << 16. first: heads that come first, a multiple of GROUP.
__device__ __forceinline__ int tile_at(int t, int rows, int columns, int first) {
    int group, later = 0;
    if (DOWN) {
        int heads = min(first, rows);
        if (t < heads || columns == 1) return t;
        t -= heads;
        // Groups whose next one has its heads before all others already.
        int lean = first / GROUP - 1, each = GROUP * (columns - 1);
        if (t < lean * each) {
            group = t / each;
            t -= group * each;
        } else {
            // The last but one may begin fewer heads than there are rows in a group.
            int last = (rows - 1) / GROUP;
            t -= lean * each;
            group = max(0, min(t / (each + GROUP), last - 1 - lean));
            t -= group * (each + GROUP);
            group += lean;
            later = max(0, min(GROUP, rows - (group + 1) * GROUP));
            int own = later + min(GROUP, rows - group * GROUP) * (columns - 1);
            if (t >= own) {
                t -= own;
                ++group;
                later = 0;
            }
        }
        if (t < later) return (group + 1) * GROUP + t;
        t -= later;
    } else {
        group = t / (GROUP * columns);
        t -= group * GROUP * columns;
    }
    int size = min(GROUP, rows - group * GROUP);
    int column = t / size;
    return (group * GROUP + t - column * size) | (column + DOWN) << 16;
}
