// Tables with a head sort by a click on a column, and back by another
document.addEventListener('DOMContentLoaded', () => {
  const value = (row, i) => {
    const text = row.cells[i].textContent.trim(), number = parseFloat(text.replace(/[, ]/g, ''))
    return Number.isNaN(number) ? text : number
  }
  const compare = (a, b) => typeof a === 'number' && typeof b === 'number' ? a - b : String(a).localeCompare(String(b))
  for (const table of document.querySelectorAll('.bd-article table')) {
    const head = table.tHead && table.tHead.rows[0], body = table.tBodies[0]
    if (!head || !body || body.rows.length < 3 || body.querySelector('[rowspan], [colspan]')) continue
    for (const [i, cell] of [...head.cells].entries()) {
      cell.classList.add('sortable')
      cell.tabIndex = 0
      const sort = () => {
        const down = cell.getAttribute('aria-sort') === 'ascending'
        const rows = [...body.rows].filter(row => row.cells.length > i)
        rows.sort((a, b) => compare(value(a, i), value(b, i)) * (down ? -1 : 1))
        for (const other of head.cells) other.removeAttribute('aria-sort')
        cell.setAttribute('aria-sort', down ? 'descending' : 'ascending')
        body.append(...rows)
      }
      cell.addEventListener('click', sort)
      cell.addEventListener('keydown', event => { if (event.key === 'Enter') sort() })
    }
  }
})
