#pragma once

// Text in which only numbers change from one step to the next. C++17 for std::to_chars, which gives the shortest decimal
// that reads back as the same double.

#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr int LONGEST = 32;  // characters of a number
constexpr double INFINITE = std::numeric_limits<double>::infinity();
constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();

// Words of a row (statistics.ROW). Of dtypes without NaN the exact extremes stand where others count NaN and +Inf.
enum Word : int32_t { MAX, MIN, MEAN, NORM, NANS, POSITIVES, NEGATIVES, FINITES, EXACT_MAX = NANS, EXACT_MIN = POSITIVES };

enum Kind : int32_t { REAL, INTEGER, BOOLEAN, UNSIGNED };

// Where a number is, and what it is: in which of several tables, at which word a value's row begins there, which word of
// that, and of what kind the value is.
struct Hole {
    int32_t table, row, word, kind;
};

// A text with holes: text[0 : pieces[0]], hole 0, as many characters as pieces[1] says, hole 1, ... Without holes there
// is one piece.
struct Text {
    const char* characters;
    const int64_t* pieces;
    const Hole* holes;
    int64_t hole_count;
    int32_t first_table;  // which of all tables is the text's table 0
};

double real(const int64_t* word) {
    double value;
    std::memcpy(&value, word, sizeof value);
    return value;
}

char* write(char* out, const char* text) {
    const size_t size = std::strlen(text);
    std::memcpy(out, text, size);
    return out + size;
}

// As encode.number has it where it is not finite.
char* write(char* out, double value) {
    if (std::isnan(value)) return write(out, "\"nan\"");
    if (std::isinf(value)) return write(out, value > 0 ? "1e999" : "-1e999");
    char* end = std::to_chars(out, out + LONGEST, value).ptr;
    for (const char* at = out; at < end; at++)
        if (*at == '.' || *at == 'e') return end;
    return write(end, ".0");  // so that it is read as a float
}

template <typename Integer>
char* write_integer(char* out, Integer value) {
    return std::to_chars(out, out + LONGEST, value).ptr;
}

// What torch makes of values that are not all finite: see statistics.read_row.
double propagated(const int64_t* row, int32_t word) {
    const bool up = row[POSITIVES], down = row[NEGATIVES];
    if (row[NANS]) return NOT_A_NUMBER;
    if (!up && !down) return real(row + word);
    switch (word) {
        case MAX:
            return up ? INFINITE : row[FINITES] ? real(row + MAX) : -INFINITE;
        case MIN:
            return down ? -INFINITE : row[FINITES] ? real(row + MIN) : INFINITE;
        case MEAN:
            return up && down ? NOT_A_NUMBER : up ? INFINITE : -INFINITE;
        default:
            return INFINITE;
    }
}

// Behind the last count: the same statistics over the finite values, where there are others.
char* write_finites(char* out, const int64_t* row) {
    if (!row[FINITES] || !(row[NANS] || row[POSITIVES] || row[NEGATIVES])) return out;
    const char* const names[] = {",\"finite_Max\":", ",\"finite_Min\":", ",\"finite_Mean\":", ",\"finite_Norm\":"};
    for (int word = MAX; word <= NORM; word++) out = write(write(out, names[word]), real(row + word));
    return out;
}

char* write_of_real(char* out, const int64_t* row, int32_t word) {
    if (word == NEGATIVES) return write_finites(write_integer(out, row[word]), row);
    if (word > NORM) return write_integer(out, row[word]);
    const bool empty = !(row[FINITES] || row[NANS] || row[POSITIVES] || row[NEGATIVES]);
    return empty ? write(out, "null") : write(out, propagated(row, word));
}

char* write(char* out, const int64_t* row, int32_t word, int32_t kind) {
    if (kind == REAL) return write_of_real(out, row, word);
    if (!row[FINITES]) return write(out, "null");
    if (word > MIN) return write(out, real(row + word));
    const int64_t exact = row[word == MAX ? EXACT_MAX : EXACT_MIN];
    if (kind == BOOLEAN) return write(out, exact ? "true" : "false");
    return kind == UNSIGNED ? write_integer(out, static_cast<uint64_t>(exact)) : write_integer(out, exact);
}

// Writes the text with its numbers to `out`, which has room for it, and returns where it ends.
char* fill(const Text& text, const int64_t* const* tables, char* out) {
    const char* from = text.characters;
    for (int64_t at = 0; at <= text.hole_count; at++) {
        std::memcpy(out, from, text.pieces[at]);
        from += text.pieces[at];
        out += text.pieces[at];
        if (at < text.hole_count) {
            const Hole& hole = text.holes[at];
            out = write(out, tables[text.first_table + hole.table] + hole.row, hole.word, hole.kind);
        }
    }
    return out;
}

}  // namespace
