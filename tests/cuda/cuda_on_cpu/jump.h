// How both emulators go from the scheduler to a thread and back. Unlike swapcontext, a jump asks
// nothing of the operating system.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>

namespace jump {

// Goes from one place to another.
inline void Switch(jmp_buf from, jmp_buf to) {
  if (_setjmp(from) == 0) _longjmp(to, 1);
}

// Where an emulated thread is.
struct Place {
  ucontext_t start;  // where it begins
  bool begun = false;
  jmp_buf context;  // where it goes on

  void BeginIn(void (*enter)(), char* stack, size_t bytes) {
    getcontext(&start);
    start.uc_stack.ss_sp = stack, start.uc_stack.ss_size = bytes;
    makecontext(&start, enter, 0);
  }

  void Resume(jmp_buf scheduler) {
    if (begun) return Switch(scheduler, context);
    begun = true;
    if (_setjmp(scheduler) == 0) setcontext(&start);
  }
};

}  // namespace jump
