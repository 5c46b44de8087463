/* A weight becomes what `linear.h` reads: panels, and for int8 its outputs' scales and offsets. */
#pragma once
#include "linear.h"

/* One output's inputs as words, zeros behind the last. */
static void put_into_words(linear *l, const scalar *weight, int64_t output, word *to) {
    const scalar *from = weight + output * l->inputs;
    memset(to, 0, l->num_words * sizeof(word));
#if WEIGHTS == INT8
    uint8_t *bytes_of_output = (uint8_t *)to;
    word sum = 0;
    ((float *)l->scales)[output] = quantize(l, from, bytes_of_output);
    for (int64_t i = 0; i < l->inputs; i++) {
        sum += bytes_of_output[i] - 128;
        bytes_of_output[i] ^= 0x80; /* 128 was added, for rows. */
    }
    memset(bytes_of_output + l->inputs, 0, l->num_words * sizeof(word) - l->inputs);
    ((word *)l->offsets)[output] = 128 * sum;
#else
    memcpy(to, from, l->inputs * sizeof(scalar));
#endif
}

/* By all threads: weight [outputs, inputs] -> l->panels, and for int8 l->scales and l->offsets. The scratch
 * [num_threads, PANEL, words + LANES] is for the outputs of a panel. */
static void fill_panels(linear *l, int64_t num_threads, const scalar *weight, word *scratch) {
    int64_t panels = (l->outputs + PANEL - 1) / PANEL, width = l->num_words + LANES;
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
    for (int64_t panel = 0; panel < panels; panel++) {
        word *own = scratch + omp_get_thread_num() * PANEL * width;
        word *to = (word *)l->panels + panel * l->num_words * PANEL;
        int64_t outputs = min(PANEL, l->outputs - panel * PANEL);
        for (int64_t i = 0; i < outputs; i++) put_into_words(l, weight, panel * PANEL + i, own + i * width);
        memset(own + outputs * width, 0, (PANEL - outputs) * width * sizeof(word));
        for (int64_t i = 0; i < l->num_words; i++)
            for (int64_t output = 0; output < PANEL; output++) to[i * PANEL + output] = own[output * width + i];
    }
}
