// How tiles of a result become items for the team.

#ifndef JAXINFER_GRID_H
#define JAXINFER_GRID_H

#include <stdint.h>

// Several tiles are one item where there are more than so many; where there are fewer than so few, one tile's panels are
// several items.
#define MOST_ITEMS 512
#define FEWEST_ITEMS 16

typedef struct {
  int64_t tiles, panels;
  int64_t together;  // tiles of one item
  int64_t parts;     // the panels of a tile are done in so many parts
} Grid;

static inline Grid grid_of(int64_t tiles, int64_t panels) {
  Grid grid = {.tiles = tiles, .panels = panels, .together = (tiles + MOST_ITEMS - 1) / MOST_ITEMS, .parts = 1};
  if (tiles && tiles < FEWEST_ITEMS) grid.parts = (FEWEST_ITEMS + tiles - 1) / tiles;
  if (grid.parts > panels) grid.parts = panels;
  return grid;
}

static inline int grid_items(const Grid *grid) {
  return grid->tiles ? (int)((grid->tiles + grid->together - 1) / grid->together * grid->parts) : 0;
}

// The tiles and the panels of an item: from the first up to but not including the last.
typedef struct {
  int64_t tile, last_tile, panel, last_panel;
} Item;

static inline Item grid_item(const Grid *grid, int number) {
  int64_t part = number % grid->parts, tile = number / grid->parts * grid->together, last = tile + grid->together;
  return (Item){.tile = tile, .last_tile = last < grid->tiles ? last : grid->tiles,
                .panel = grid->panels * part / grid->parts, .last_panel = grid->panels * (part + 1) / grid->parts};
}

#endif
