// A folder and its files, made without Python and without its lock: a thread that asks for the lock after each call of
// the system waits for the thread that computes, and that one for it.
//
// Plain C functions: folder.py calls them through ctypes. POSIX.

#include <cerrno>
#include <cstdint>
#include <fcntl.h>
#include <string>
#include <sys/stat.h>
#include <unistd.h>

namespace {

bool write_file(const char* path, const char* content, int64_t size) {
    const int file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (file < 0) return false;
    while (size) {  // a disk that is nearly full takes less than it is given
        const ssize_t written = write(file, content, size);
        if (written < 0 && errno == EINTR) continue;
        if (written <= 0) break;
        content += written;
        size -= written;
    }
    return !close(file) && !size;
}

}  // namespace

extern "C" {

// Makes `part` with `count` files in it, then renames it to `folder`. Where `same[i]` is not null, and there is a file of
// that path, files[i] becomes another name of it. Returns whether all of it was done; if not, what is there is to be
// removed.
int32_t msprobe_graph_write_folder(const char* folder, const char* part, int64_t count, const char* const* files,
                                   const char* const* contents, const int64_t* sizes, const char* const* same) {
    const std::string path(part);
    mkdir(path.substr(0, path.rfind('/')).c_str(), 0777);  // as a rule it isn't there yet, either
    if (mkdir(part, 0777)) return false;
    for (int64_t at = 0; at < count; at++)
        if (!(same[at] && !link(same[at], files[at])) && !write_file(files[at], contents[at], sizes[at])) return false;
    return !rename(part, folder);
}
}
