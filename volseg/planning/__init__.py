"""What a run will take: memory, disk, time, and every choice that its settings leave open."""
