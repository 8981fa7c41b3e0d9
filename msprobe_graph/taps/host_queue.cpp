// The way of values out of graphs that a device replays: host functions put them into a queue, a thread of Python takes
// them out. No Python here and none of its locks, and no call of the device's: a host function must not make any.
//
// Plain C functions over plain memory: host_queue.py calls them through ctypes. Queues are never freed, as a thread
// waits in each of them until the process ends.

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>

extern "C" {

// What the queue holds: the bytes of one replay, or, where `size` is OVER, that its source hands over no more.
struct Value {
    int64_t source;
    int64_t size;
    void* bytes;  // none when there was no memory for them
    Value* next;
};
}

namespace {

constexpr int64_t OVER = -1;

struct Queue {
    std::mutex mutex;  // held for moments only, and never while its holder waits for another lock
    std::condition_variable arrived, room;
    Value* first = nullptr;
    Value* last = nullptr;
    int64_t held = 0;  // bytes of all values that are not done
    int64_t limit;
    std::chrono::milliseconds patience;
};

// A place in a graph: each replay writes the slot anew, and then calls msprobe_graph_push.
struct Source {
    Queue* queue;
    int64_t number;
    const void* slot;
    int64_t size;
};

void append(Queue* queue, Value* value) {
    value->next = nullptr;
    {
        std::lock_guard<std::mutex> lock(queue->mutex);
        (queue->last ? queue->last->next : queue->first) = value;
        queue->last = value;
    }
    queue->arrived.notify_one();
}

}  // namespace

extern "C" {

Queue* msprobe_graph_queue(int64_t limit, int64_t patience) {
    Queue* queue = new Queue;
    queue->limit = limit;
    queue->patience = std::chrono::milliseconds(patience);
    return queue;
}

Source* msprobe_graph_source(Queue* queue, int64_t number, const void* slot, int64_t size) {
    return new Source{queue, number, slot, size};
}

// The host function. Waits for room, so that nothing is lost; but not for ever: a thread that waits for this very stream
// may hold Python's lock meanwhile, and without it nothing is taken.
void msprobe_graph_push(void* data) {
    const Source* source = static_cast<Source*>(data);
    Queue* queue = source->queue;
    {
        std::unique_lock<std::mutex> lock(queue->mutex);
        queue->room.wait_for(lock, queue->patience, [&] {
            return queue->held == 0 || queue->held + source->size <= queue->limit;
        });
        queue->held += source->size;
    }
    void* memory = std::malloc(sizeof(Value) + source->size);
    const bool fits = memory != nullptr;
    if (!fits) memory = std::malloc(sizeof(Value));
    if (!memory) std::abort();
    Value* value = static_cast<Value*>(memory);
    *value = Value{source->number, source->size, fits ? value + 1 : nullptr, nullptr};
    if (fits && source->size) std::memcpy(value->bytes, source->slot, source->size);
    append(queue, value);
}

// Called when nothing calls msprobe_graph_push with this source any more. Waits for nothing.
void msprobe_graph_end(void* data) {
    Source* source = static_cast<Source*>(data);
    Value* value = static_cast<Value*>(std::malloc(sizeof(Value)));
    if (!value) std::abort();
    *value = Value{source->number, OVER, nullptr, nullptr};
    append(source->queue, value);
    delete source;
}

// The value that was put in first; waits until there is one. It counts as held until msprobe_graph_done.
Value* msprobe_graph_take(Queue* queue) {
    std::unique_lock<std::mutex> lock(queue->mutex);
    queue->arrived.wait(lock, [&] { return queue->first != nullptr; });
    Value* value = queue->first;
    queue->first = value->next;
    if (!queue->first) queue->last = nullptr;
    return value;
}

void msprobe_graph_done(Queue* queue, Value* value) {
    if (value->size > 0) {
        std::lock_guard<std::mutex> lock(queue->mutex);
        queue->held -= value->size;
    }
    std::free(value);
    queue->room.notify_all();
}

// From now on nobody waits for room.
void msprobe_graph_widen(Queue* queue) {
    {
        std::lock_guard<std::mutex> lock(queue->mutex);
        queue->limit = std::numeric_limits<int64_t>::max() / 2;
    }
    queue->room.notify_all();
}
}
