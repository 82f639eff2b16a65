for (const map of document.querySelectorAll('.map')) {
  const data = JSON.parse(map.querySelector('script').textContent), [nz, ny, nx] = data.grid
  const bytes = Uint8Array.from(atob(data.values), c => c.charCodeAt(0))
  const canvas = map.querySelector('canvas'), slider = map.querySelector('input'), said = map.querySelector('output')
  const strip = nx * ny < 4  // few blocks in a layer: all layers beside each other
  const [columns, rows] = strip ? [nz, nx * ny] : [nx, ny]
  const number = (z, row, column) => strip ? column * rows + row : (z * ny + row) * nx + column
  canvas.width = columns; canvas.height = rows
  const [height, width] = [1, 2].map(axis => data.edges[axis].at(-1) - data.edges[axis][0])
  canvas.style.aspectRatio = strip ? '7' : `${width} / ${height}`
  slider.hidden = said.hidden = strip
  const draw = () => {
    const z = +slider.value, image = canvas.getContext('2d').createImageData(columns, rows)
    for (let i = 0; i < columns * rows; i++) {
      const v = bytes[number(z, Math.floor(i / columns), i % columns)], t = (v - 2) / 253
      const rgb = v == 0 ? [128, 128, 128] : v == 1 ? [214, 211, 209] : [20 + 225 * t, 120 + 60 * t - 130 * t * t, 130 - 110 * t]
      image.data.set([...rgb, 255], 4 * i)
    }
    canvas.getContext('2d').putImageData(image, 0, 0)
    said.textContent = `layer ${z + 1} of ${nz}: z ${data.edges[0][z]} to ${data.edges[0][z + 1]}`
  }
  canvas.onmousemove = e => {
    const box = canvas.getBoundingClientRect(), z = +slider.value
    const column = Math.min(columns - 1, Math.floor((e.clientX - box.left) / box.width * columns))
    const row = Math.min(rows - 1, Math.floor((e.clientY - box.top) / box.height * rows)), i = number(z, row, column)
    const place = [Math.floor(i / (nx * ny)), Math.floor(i / nx) % ny, i % nx]
    const at = place.map((k, axis) => data.edges[axis][k])
    const [bz, by, bx] = place.map((k, axis) => data.first[axis] + k), [, wy, wx] = data.whole
    const v = bytes[i], s = data.low * Math.pow(data.high / data.low, (v - 2) / 253)
    const what = v == 0 ? 'not read' : v == 1 ? 'nothing wanted there' : s.toPrecision(2) + ' s'
    canvas.title = `block ${(bz * wy + by) * wx + bx} from z y x ${at.join(' ')}: ${what}`
  }
  slider.oninput = draw; draw()
}
