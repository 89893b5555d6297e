#pragma once

// What the elements of a tensor are.
enum class Storage { float32, bfloat16 };
