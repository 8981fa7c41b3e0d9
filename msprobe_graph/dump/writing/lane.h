#pragma once

// Steps of which all but the numbers is known, written by a thread that has nothing to do with Python: see lane.py.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "files.h"
#include "numbers.h"

namespace {

constexpr int64_t WORDS = 10;           // of a slot, as it arrives; arrival.py says which
constexpr int64_t FIRED = 8, TAG = 9;
constexpr int NOT_READY = 600;          // what the driver says of an event that has not happened
constexpr auto POLL = std::chrono::microseconds(40);
constexpr int PATIENCE = 500;           // so often it is looked for a job before the thread sleeps: to wake it costs the
                                        // program more than all else

// lane.py has the same structures.

struct File {
    const char* name;
    const Text* texts;
    int64_t text_count, room;
    int32_t lasting;  // it is the same in all steps of the form
};

// What a table of slots is to hold besides statistics.
struct Written {
    const int64_t *fired, *tags;
    int64_t slots;
    int32_t table;
};

struct Form {
    const File* files;
    int64_t file_count;
    const Written* written;
    int64_t written_count;
    const char *begin, *between, *end;  // of the manifest: around the step's number, and its requests
    char* last;  // the folder of the last step of this form, or ""
    int64_t last_room;
};

typedef int Query(void* event);

// Where numbers are, once the event has happened. No event: at once.
struct Table {
    const int64_t* words;
    int64_t rows;
    Query* query;
    void* event;
};

struct Job {
    std::vector<const Form*> forms;
    std::vector<Table> tables;
    std::string folder;
    int64_t number;
    std::string requests;
};

// Whether the event has happened; false if the driver can't tell.
bool wait_for(const Table& table) {
    if (!table.query) return true;
    int code;
    while ((code = table.query(table.event)) == NOT_READY) std::this_thread::sleep_for(POLL);
    return code == 0;
}

bool is_of(const Job& job, const Form& form) {
    for (int64_t at = 0; at < form.written_count; at++) {
        const Written& written = form.written[at];
        const Table& table = job.tables[written.table];
        if (table.rows != written.slots) return false;
        for (int64_t slot = 0; slot < written.slots; slot++) {
            const int64_t* const found = table.words + slot * WORDS;
            if (found[FIRED] != written.fired[slot] || found[TAG] != written.tags[slot]) return false;
        }
    }
    return true;
}

// Python reads them where they lie, as two int64s.
struct Counts {
    std::atomic<int64_t> settled{0};  // steps
    std::atomic<int64_t> bytes{0};    // written
};
static_assert(sizeof(Counts) == 2 * sizeof(int64_t) && std::atomic<int64_t>::is_always_lock_free);

class Lane {
  public:
    void put(Job job) {
        const std::lock_guard<std::mutex> held(lock);
        jobs.push_back(std::move(job));
        if (idle) come.notify_one();
    }

    // Writes what comes. Returns when a step is of none of its forms, or can't be written like this: its number, from 0.
    // It counts as settled when this is called the next time.
    int64_t run() {
        std::unique_lock<std::mutex> held(lock);
        if (refused) settle();
        while (true) {
            for (int turn = 0; jobs.empty() && turn < PATIENCE; turn++) {
                held.unlock();
                std::this_thread::sleep_for(POLL);
                held.lock();
            }
            idle = true;
            come.wait(held, [this] { return !jobs.empty(); });
            idle = false;
            held.unlock();
            const bool done = make(jobs.front());  // only this thread takes from the front
            held.lock();
            refused = !done;
            if (refused) return counts.settled;
            settle();
        }
    }

    // Returns when so many have been settled.
    void wait(int64_t count) {
        std::unique_lock<std::mutex> held(lock);
        gone.wait(held, [this, count] { return counts.settled >= count; });
    }

    Counts counts;

  private:
    std::mutex lock;
    std::condition_variable come, gone;
    std::deque<Job> jobs;
    bool refused = false, idle = false;
    std::vector<char> buffer;

    void settle() {
        refused = false;
        jobs.pop_front();
        counts.settled++;
        gone.notify_all();
    }

    bool make(const Job& job) {
        for (const Table& table : job.tables)
            if (!wait_for(table)) return false;
        for (const Form* form : job.forms)
            if (is_of(job, *form)) return make(job, *form);
        return false;
    }

    bool make(const Job& job, const Form& form) {
        std::vector<const int64_t*> tables;
        for (const Table& table : job.tables) tables.push_back(table.words);
        int64_t room = 0;
        for (int64_t at = 0; at < form.file_count; at++) room += form.files[at].room;
        if (static_cast<int64_t>(buffer.size()) < room) buffer.resize(room);
        std::vector<Content> contents;
        std::vector<std::string> links(form.file_count);
        char* out = buffer.data();
        for (int64_t at = 0; at < form.file_count; at++) {
            const File& file = form.files[at];
            char* const begin = out;
            for (int64_t text = 0; text < file.text_count; text++) out = fill(file.texts[text], tables.data(), out);
            if (file.lasting && *form.last) links[at] = std::string(form.last) + '/' + file.name;
            contents.push_back({file.name, begin, out - begin, links[at].empty() ? nullptr : links[at].c_str()});
        }
        const std::string manifest = form.begin + std::to_string(job.number) + form.between + job.requests + form.end;
        contents.push_back({"manifest.json", manifest.data(), static_cast<int64_t>(manifest.size()), nullptr});
        const std::string part = job.folder + ".part";
        if (!write_folder(job.folder.c_str(), part.c_str(), contents.data(), contents.size())) return false;
        if (static_cast<int64_t>(job.folder.size()) < form.last_room)
            std::memcpy(form.last, job.folder.c_str(), job.folder.size() + 1);
        contents.pop_back();  // the manifest does not count
        for (const Content& content : contents) counts.bytes += content.size;
        return true;
    }
};

}  // namespace
