// Launches every kernel of cuda/ on small, odd shapes, for compute-sanitizer:
//   compute-sanitizer --tool memcheck sanitize
//   compute-sanitizer --tool racecheck sanitize hopper one 0 4
// The first argument is how the names of kernels begin. The second is "one", for a single case of
// each kernel, or "all". The last two are the number of a part of the cases, and how many parts
// there are. Prints a line for each case, and fails where a kernel refuses one or gives nan.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "cases.h"

int main(int count, char** arguments) {
  slidejax::sanitize::Runner::Choice choice;
  if (count > 1) choice.prefix = arguments[1];
  if (count > 2) choice.one = arguments[2] == std::string("one");
  if (count > 4) choice.part = std::atoi(arguments[3]), choice.parts = std::atoi(arguments[4]);
  slidejax::sanitize::Runner run(choice);
  slidejax::sanitize::LiftCases(run);
  slidejax::sanitize::DecodeCases(run);
  slidejax::sanitize::HopperCases(run);
  slidejax::sanitize::AttentionCases(run);
  slidejax::sanitize::CusparseltCases(run);
  // These have faults, so they run only if they are asked for.
  if (choice.prefix.rfind("planted", 0) == 0) slidejax::sanitize::PlantedCases(run);
  std::printf("%d cases, %d failed\n", run.cases(), run.failures());
  return run.cases() == 0 || run.failures() > 0;
}
