// Runs calls of a core for another processor than this machine's; see emulated.py.
//
//   emulated CORE DESCRIPTOR SIZE
//
// The descriptor is of memory that both programs see. Tells at which address it lies here and the
// best level of instructions, and then runs the call at the memory's beginning for each byte that
// comes in, and answers with the call's status.

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

int main(int, char** argv) {
  void* core = dlopen(argv[1], RTLD_NOW);
  if (!core) return fprintf(stderr, "%s\n", dlerror()), 1;
  const auto level = reinterpret_cast<int (*)()>(dlsym(core, "deformnd_level"));
  const auto run = reinterpret_cast<int (*)(const int64_t*)>(dlsym(core, "deformnd_run"));
  void* memory = mmap(nullptr, strtoull(argv[3], nullptr, 10), PROT_READ | PROT_WRITE, MAP_SHARED,
                      atoi(argv[2]), 0);
  if (!level || !run || memory == MAP_FAILED) return 1;
  const int64_t said[] = {reinterpret_cast<intptr_t>(memory), level()};
  bool good = write(1, said, sizeof said) == sizeof said;
  for (char byte; good && read(0, &byte, 1) == 1;) {
    byte = char(run(static_cast<const int64_t*>(memory)));
    good = write(1, &byte, 1) == 1;
  }
}
