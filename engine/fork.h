// What survives a fork. A child has the memory of its parent and none of its threads, and a
// mutex that another thread held stays locked there for ever.
#pragma once

#include <mutex>

namespace rbln_vae {

// Held while the process forks: what is changed under it alone is whole in the child, and the
// mutex is free there.
std::mutex& fork_guard();

// How many forks led from the start of the program to this process.
int forks();

}  // namespace rbln_vae
