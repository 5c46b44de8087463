/* Products of bf16 and int8 by AMX, where processor and system have it: 16 x 16 sums from 16 words of each row.
 *
 * A weight's panel is laid out as the tiles want it. Where there are tiles they serve any number of rows, since their
 * order of additions is not that of the vectors: of every 16 words the lower halves (bf16) are summed by themselves.
 */
#pragma once
#include "words.h"

static int has_tiles = 0;

#if defined(__AMX_TILE__) && ((WEIGHTS == BF16 && defined(__AMX_BF16__)) || (WEIGHTS == INT8 && defined(__AMX_INT8__)))
#include <sys/syscall.h>
#include <unistd.h>

#if WEIGHTS == BF16
#define TILE_PRODUCT _tile_dpbf16ps
#else
#define TILE_PRODUCT _tile_dpbusd
#endif
#define TILE_ROWS 16
#define TILE_WORDS 16
#define TILE_GROUP (2 * TILE_ROWS)

/* Linux saves a process's tiles only if it has asked for that. */
static void ask_for_tiles(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    has_tiles = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

/* Tiles 0 to 3 hold sums, 4 and 5 weights, 6 and 7 rows; 2, 3 and 7 are for the rows from the 17th on. */
static void configure_tiles(int64_t rows) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) config.bytes[tile] = 4 * TILE_WORDS, config.rows[tile] = TILE_ROWS;
    config.rows[0] = config.rows[1] = config.rows[6] = min(rows, TILE_ROWS);
    if (rows > TILE_ROWS) config.rows[2] = config.rows[3] = config.rows[7] = rows - TILE_ROWS;
    __asm__ volatile("" : : "m"(config)); /* GCC 12 may think that nobody reads it, and drop the lines above. */
    _tile_loadconfig(&config);
}

/* Up to TILE_GROUP rows `x` [rows, num_words] against a panel [num_words, 32]: out [rows, 32]. */
static void multiply_tiles(
    int64_t rows, int64_t num_words, const word *x, const word *panel, int64_t ahead, word *out) {
    enum { WIDTH = 2 * TILE_WORDS };
    int64_t row_bytes = num_words * sizeof(word);
    int has_more = rows > TILE_ROWS;
    configure_tiles(rows);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < num_words; i += TILE_WORDS) {
        const word *weights = panel + i * WIDTH;
        for (int line = 0; ahead && line < 2 * TILE_WORDS; line++)
            __builtin_prefetch((const char *)(weights + line * TILE_WORDS) + ahead, 0, 2);
        _tile_loadd(4, weights, WIDTH * sizeof(word));
        _tile_loadd(5, weights + TILE_WORDS, WIDTH * sizeof(word));
        _tile_loadd(6, x + i, row_bytes);
        TILE_PRODUCT(0, 6, 4);
        TILE_PRODUCT(1, 6, 5);
        if (has_more) {
            _tile_loadd(7, x + TILE_ROWS * num_words + i, row_bytes);
            TILE_PRODUCT(2, 7, 4);
            TILE_PRODUCT(3, 7, 5);
        }
    }
    _tile_stored(0, out, WIDTH * sizeof(word));
    _tile_stored(1, out + TILE_WORDS, WIDTH * sizeof(word));
    if (has_more) {
        _tile_stored(2, out + TILE_ROWS * WIDTH, WIDTH * sizeof(word));
        _tile_stored(3, out + TILE_ROWS * WIDTH + TILE_WORDS, WIDTH * sizeof(word));
    }
}

static void release_tiles(void) {
    if (has_tiles) _tile_release();
}
#else
#define TILE_GROUP 1
static void ask_for_tiles(void) {}
static void multiply_tiles(
    int64_t rows, int64_t num_words, const word *x, const word *panel, int64_t ahead, word *out) {}
static void release_tiles(void) {}
#endif
