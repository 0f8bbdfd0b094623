// The C names of the published library, for projects that call it through ctypes. They return nothing: bad arguments leave the output untouched.
#include "api.h"
