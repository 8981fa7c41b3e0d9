#pragma once

// A folder and its files, made without Python and without its lock: a thread that asks for the lock after each call of
// the system waits for the thread that computes, and that one for it. POSIX.

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

struct Content {
    const char *name, *text;
    int64_t size;
    const char* same;  // a file with these contents, which gets another name; or null
};

// Makes `part` with these files in it, then renames it to `folder`. Returns whether all of it was done; if not, what is
// there is to be removed.
bool write_folder(const char* folder, const char* part, const Content* files, int64_t count) {
    const std::string path(part);
    mkdir(path.substr(0, path.rfind('/')).c_str(), 0777);  // as a rule it isn't there yet, either
    if (mkdir(part, 0777)) return false;
    for (int64_t at = 0; at < count; at++) {
        const Content& file = files[at];
        const std::string name = path + '/' + file.name;
        if (!(file.same && !link(file.same, name.c_str())) && !write_file(name.c_str(), file.text, file.size))
            return false;
    }
    return !rename(part, folder);
}

}  // namespace
