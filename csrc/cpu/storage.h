#pragma once

// The element type of a tensor.
enum class Storage { float32, bfloat16 };
