// What a step's files are made with where Python would take too long. Plain C functions over plain memory: template.py,
// folder.py and lane.py call them through ctypes, without the interpreter's lock.

#include "lane.h"

extern "C" {

// Writes the text with its numbers to `out`, and returns how many bytes that are.
int64_t msprobe_graph_fill(const Text* text, const int64_t* const* tables, char* out) {
    return fill(*text, tables, out) - out;
}

int32_t msprobe_graph_write_folder(const char* folder, const char* part, const Content* files, int64_t count) {
    return write_folder(folder, part, files, count);
}

// A lane lives as long as the process.
Lane* msprobe_graph_lane() { return new Lane(); }

void msprobe_graph_lane_put(Lane* lane, const Form* const* forms, int64_t form_count, const Table* tables,
                            int64_t table_count, const char* folder, int64_t number, const char* requests) {
    lane->put({{forms, forms + form_count}, {tables, tables + table_count}, folder, number, requests});
}

int64_t msprobe_graph_lane_run(Lane* lane) { return lane->run(); }

void msprobe_graph_lane_wait(Lane* lane, int64_t count) { lane->wait(count); }

// Where its counts are: how many steps have been settled, and how many bytes were written.
const void* msprobe_graph_lane_counts(Lane* lane) { return &lane->counts; }
}
